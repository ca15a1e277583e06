"""What is Redis's own: ways to connect, expiry, refusals, what others keep there."""

import datetime
import ipaddress
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.flexkv.remote_servers import RedisServer, free_port, require_backend, soon

from flexkv.storage.remote.base import RemoteStoreError
from flexkv.storage.remote.factory import open_backend
from flexkv.storage.remote.keys import block_key
from flexkv.storage.remote.redis import RedisStore
from flexkv.storage.remote.resp import RespWire, command

KEY = block_key(None, "m", bytes(range(32)))
VALUE = np.arange(100_000, dtype=np.uint32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[RedisServer]:
    require_backend("redis")
    server = RedisServer("--unixsocket", str(directory / "socket"))
    yield server
    server.kill()


def open_redis(url: str) -> RedisStore:
    store = open_backend(url, block_bytes=VALUE.nbytes)
    assert isinstance(store, RedisStore)
    return store


def round_trips(store: RedisStore) -> bool:
    buffer = np.zeros_like(VALUE)
    assert store.put([KEY], [VALUE], soon()).all()
    return bool(store.get([KEY], [buffer], soon()).all()) and bool((buffer == VALUE).all())


def ask(store: RedisStore, *parts: bytes) -> object:
    with store._wire(soon()) as wire:
        wire.send([command(*parts)])
        return wire.read_reply()


def test_a_unix_socket_and_databases_of_their_own(server: RedisServer, directory: Path) -> None:
    with (
        open_redis(f"unix://{directory}/socket?db=3") as by_socket,
        open_redis(f"redis://127.0.0.1:{server.port}/3") as same,
        open_redis(f"redis://localhost:{server.port}") as other,
    ):
        assert round_trips(by_socket)
        assert same.exists([KEY], soon()).all()
        assert not other.exists([KEY], soon()).any()


def test_values_expire_when_asked_to(server: RedisServer) -> None:
    with open_redis(f"{server.url}?ttl_s=100") as store:
        assert round_trips(store)
        left = ask(store, b"PTTL", KEY.encode())
        assert isinstance(left, int)
        assert 0 < left <= 100_000
    with open_redis(server.url) as store:
        assert round_trips(store)
        assert ask(store, b"PTTL", KEY.encode()) == -1


def test_small_windows_and_one_connection_serve_many_threads(server: RedisServer) -> None:
    keys = [block_key(None, "m", bytes([i])) for i in range(8)]
    with open_redis(f"{server.url}?window_mb=1&max_connections=1") as store:
        results: list[bool] = []

        def run() -> None:
            buffers = np.zeros((8, VALUE.size), np.uint32)
            stored = store.put(keys, [VALUE] * 8, soon()).all()
            results.append(bool(stored and store.get(keys, list(buffers), soon()).all() and (buffers == VALUE).all()))

        threads = [threading.Thread(target=run) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 5
        assert len(store._idle) == 1


def test_what_others_keep_under_the_key_is_a_miss_and_replaced(server: RedisServer) -> None:
    other = block_key(None, "m", b"other")
    with open_redis(server.url) as store:
        store.delete([KEY, other], soon())
        assert store.put([other], [VALUE], soon()).all()
        assert ask(store, b"RPUSH", KEY.encode(), b"a list") == 1
        buffers = [np.zeros_like(VALUE), np.zeros_like(VALUE)]
        assert store.get([KEY, other], buffers, soon()).tolist() == [False, True]
        assert store.num_bad_values == 1
        assert round_trips(store)


def test_a_connection_that_the_server_closed_is_not_used_again(server: RedisServer) -> None:
    with open_redis(server.url) as store, open_redis(server.url) as killer:
        assert round_trips(store)
        ask(killer, b"CLIENT", b"KILL", b"TYPE", b"normal", b"SKIPME", b"yes")
        assert round_trips(store)


def test_passwords_are_given_and_refusals_named(directory: Path) -> None:
    require_backend("redis")
    acl = directory / "users.acl"
    acl.write_text("user default off\nuser kv on >p@ss/word ~* +@all\nuser reader on >r ~* +@read +@connection\n")
    server = RedisServer("--aclfile", str(acl))
    try:
        with open_redis(f"redis://kv:p%40ss%2Fword@127.0.0.1:{server.port}/0") as store:
            assert round_trips(store)
        for who in ("", "kv:wrong@", "default:p@"):
            with open_redis(f"redis://{who}127.0.0.1:{server.port}/0") as store:
                with pytest.raises(RemoteStoreError, match=r"NOAUTH|WRONGPASS") as caught:
                    store.exists([KEY], soon())
                assert not caught.value.is_transient
                assert not store.ping(soon())
        with open_redis(f"redis://reader:r@127.0.0.1:{server.port}/0") as store:
            buffers = [np.zeros_like(VALUE)] * 2
            with pytest.raises(RemoteStoreError, match="NOPERM"):
                store.put([KEY, KEY], buffers, soon())
            assert store.get([KEY], buffers[:1], soon()).all()
    finally:
        server.kill()


def test_a_full_server_stores_nothing_and_serves_what_it_has() -> None:
    require_backend("redis")
    server = RedisServer("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    keys = [block_key(None, "m", bytes([i])) for i in range(40)]
    try:
        with open_redis(server.url) as store:
            stored = store.put(keys, [VALUE] * 40, soon())
            assert 0 < stored.sum() < 40
            buffers = np.zeros((40, VALUE.size), np.uint32)
            assert store.get(keys, list(buffers), soon()).tolist() == stored.tolist()
    finally:
        server.kill()


def test_tls_with_a_certificate_that_is_checked(directory: Path) -> None:
    require_backend("redis")
    make_certificate(directory)
    port = free_port()
    names = {"cert-file": "cert.pem", "key-file": "key.pem", "ca-cert-file": "cert.pem"}
    options = [text for name, file in names.items() for text in (f"--tls-{name}", str(directory / file))]
    server = RedisServer("--tls-port", str(port), "--tls-auth-clients", "no", *options)
    try:
        with open_redis(f"rediss://127.0.0.1:{port}/0?ca_certs={directory}/cert.pem") as store:
            for _ in range(3):
                assert round_trips(store)
            assert len(store._idle) == 1
        with open_redis(f"rediss://127.0.0.1:{port}/0?verify=no") as store:
            assert round_trips(store)
        with open_redis(f"rediss://127.0.0.1:{port}/0") as store, pytest.raises(RemoteStoreError, match="certificate"):
            store.exists([KEY], soon())
    finally:
        server.kill()


def make_certificate(directory: Path) -> None:
    """Write a certificate for 127.0.0.1 that vouches for itself, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


# -- the wire by itself ------------------------------------------------------------------------------------------------
@pytest.fixture
def wire() -> Iterator[tuple[RespWire, socket.socket]]:
    ours, theirs = socket.socketpair()
    wire = RespWire()
    wire.deadline = soon()
    wire.attach(ours)
    with ours, theirs:
        yield wire, theirs


def test_replies_are_read_however_they_are_cut(wire: tuple[RespWire, socket.socket]) -> None:
    reader, server = wire
    replies = b"+OK\r\n:42\r\n$5\r\na\r\nbc\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n$8\r\nhhpayloa\r\n$-1\r\n+PONG\r\n"

    def send() -> None:
        for byte in replies:
            server.sendall(bytes([byte]))

    thread = threading.Thread(target=send)
    thread.start()
    assert [reader.read_reply() for _ in range(5)] == [b"OK", 42, b"a\r\nbc", None, [1, b""]]
    header, payload = bytearray(2), bytearray(6)
    assert reader.read_value(memoryview(header), memoryview(payload)) is True
    assert (header, payload) == (b"hh", b"payloa")
    assert reader.read_value(memoryview(header), memoryview(payload)) is None
    assert reader.read_reply() == b"PONG"
    thread.join()


def test_a_value_of_another_size_is_skipped(wire: tuple[RespWire, socket.socket]) -> None:
    reader, server = wire
    server.sendall(b"$30\r\n" + b"\r\n" * 15 + b"\r\n:7\r\n")
    assert reader.read_value(memoryview(bytearray(2)), memoryview(bytearray(6))) is False
    assert reader.read_reply() == 7


@pytest.mark.parametrize("reply", [b"?\r\n", b"HTTP/1.1 400\r\n", b"$abc\r\n", b":\r\n", b"$999999999999\r\n", b"\r\n"])
def test_what_is_no_reply_is_an_error(wire: tuple[RespWire, socket.socket], reply: bytes) -> None:
    reader, server = wire
    server.sendall(reply)
    with pytest.raises(RemoteStoreError, match="Redis server"):
        reader.read_reply()


def test_a_line_without_end_is_an_error(wire: tuple[RespWire, socket.socket]) -> None:
    reader, server = wire
    thread = threading.Thread(target=server.sendall, args=(b"+" + b"x" * 100_000,))
    thread.start()
    with pytest.raises(RemoteStoreError, match="without end"):
        reader.read_reply()
    reader._socket.close()
    thread.join()
