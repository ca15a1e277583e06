"""One suite that every remote store passes, each against the real thing."""

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.flexkv.remote_servers import (
    MooncakeServer,
    RedisServer,
    S3Server,
    Server,
    eventually,
    require_backend,
    soon,
)

from flexkv.common.config import ResilienceConfig
from flexkv.errors import InvalidRequestError
from flexkv.storage.remote.base import RemoteBackend, RemoteStore, RemoteStoreError, RemoteTimeoutError
from flexkv.storage.remote.factory import open_backend, open_remote_store
from flexkv.storage.remote.keys import block_key
from flexkv.storage.remote.mooncake import MooncakeStore
from flexkv.storage.remote.mooncake_wire import LaneOp
from flexkv.storage.remote.posix import PosixStore
from flexkv.storage.remote.redis import RedisStore
from flexkv.storage.remote.resilient import ResilientStore
from flexkv.storage.remote.s3 import S3Store
from flexkv.storage.remote.value import HEADER_BYTES, make_header

BLOCK_BYTES = 4 * 2**20
IMPATIENT = ResilienceConfig(cooldown_s=0.05)
SERVERS: dict[str, type[Server]] = {"redis": RedisServer, "s3": S3Server, "mooncake": MooncakeServer}
KINDS = ("posix", "resilient", *SERVERS)


class Place:
    """Where the stores of one kind are opened."""

    def __init__(self, kind: str, url: str, server: Server | None) -> None:
        self.kind = kind
        self.url = url
        self.server = server

    def open(self) -> RemoteBackend:
        return open_backend(self.url, block_bytes=BLOCK_BYTES)

    def open_another(self) -> RemoteBackend:
        """Open a second store, which lends a cluster no memory of its own."""
        return open_backend(self.url.replace("segment_mb=256", "segment_mb=0"), block_bytes=BLOCK_BYTES)


def make_place(kind: str, directory: Path, stack: ExitStack) -> Place:
    require_backend(kind)
    if kind in ("posix", "resilient"):  # the wrapper passes the same suite, around the quickest of them
        return Place(kind, f"file://{directory}", None)
    server = SERVERS[kind]()
    stack.callback(server.kill)
    return Place(kind, server.url, server)


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield make_place(request.param, tmp_path_factory.mktemp("remote"), stack)


@pytest.fixture(scope="module")
def backend(place: Place) -> Iterator[RemoteBackend]:
    with place.open() as store:
        assert store.ping(soon())
        yield store


@pytest.fixture
def store(place: Place, backend: RemoteBackend) -> RemoteStore:
    return ResilientStore(backend) if place.kind == "resilient" else backend


rng = np.random.default_rng(20)


def new_keys(count: int, namespace: str = "tests") -> list[str]:
    return [block_key(namespace, "model;layers=2", rng.bytes(32)) for _ in range(count)]


def block(size: int) -> np.ndarray:
    return rng.integers(0, 256, size, np.uint8)


def read(store: RemoteStore, key: str, size: int) -> np.ndarray | None:
    """Return the value of a key if the store vouches for it."""
    buffer = np.zeros(size, np.uint8)
    return buffer if store.get([key], [buffer], soon())[0] else None


# -- raw access, to put there what no store would write ----------------------------------------------------------------
def write_raw(store: RemoteBackend, key: str, value: bytes) -> None:
    match store:
        case PosixStore():
            Path(store._path(key)).write_bytes(value)
        case RedisStore():
            with store._wire(soon()) as wire:
                wire.send([b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (len(key), key.encode())])
                wire.send([b"$%d\r\n%b\r\n" % (len(value), value)])
                assert wire.read_reply() == b"OK"
        case S3Store():
            store._store.put(key, value, use_multipart=False)
        case MooncakeStore():
            with store._lane(soon()) as lane:
                lane.slots([len(value)])[0][:] = np.frombuffer(value, np.uint8)
                assert lane.ask(LaneOp.PUT, [key], [len(value)], soon()) == [0]


SIZES = (1, 7, 64, 4096, 65_537, 1_000_000, 1_835_008, BLOCK_BYTES)


def test_blocks_of_every_size_come_back(store: RemoteStore) -> None:
    keys, blocks = new_keys(len(SIZES)), [block(size) for size in SIZES]
    assert store.put(keys, blocks, soon()).tolist() == [True] * len(SIZES)
    buffers = [np.zeros_like(b) for b in blocks]
    assert store.get(keys, buffers, soon()).all()
    for expected, actual in zip(blocks, buffers, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_missing_keys_are_misses_wherever_they_stand(store: RemoteStore) -> None:
    keys, value = new_keys(5), block(5000)
    assert store.put(keys[1:4:2], [value, value], soon()).all()
    buffers = [np.zeros(5000, np.uint8) for _ in keys]
    expected = [False, True, False, True, False]
    assert store.exists(keys, soon()).tolist() == expected
    assert store.get(keys, buffers, soon()).tolist() == expected
    assert (buffers[1] == value).all()
    assert (buffers[3] == value).all()


def test_the_latest_value_is_read(store: RemoteStore) -> None:
    (key,) = new_keys(1)
    for size in (3000, 3000, 100, 70_000):
        value = block(size)
        assert store.put([key], [value], soon()).all()
        np.testing.assert_array_equal(read(store, key, size), value)


def test_deleted_blocks_are_gone_and_unknown_ones_no_error(store: RemoteStore) -> None:
    keys, value = new_keys(3), block(2000)
    assert store.put(keys, [value] * 3, soon()).all()
    read(store, keys[0], 2000)  # some stores protect what has just been read
    store.delete([keys[0], *new_keys(2), keys[2]], soon())
    assert store.exists(keys, soon()).tolist() == [False, True, False]
    assert read(store, keys[0], 2000) is None
    store.delete(keys, soon())
    store.delete(keys, soon())
    assert not store.exists(keys, soon()).any()


def test_a_batch_of_five_hundred(store: RemoteStore) -> None:
    keys, blocks = new_keys(500), rng.integers(0, 256, (500, 3000), np.uint8)
    assert store.put(keys, list(blocks), soon()).all()
    buffers = np.zeros_like(blocks)
    assert store.get(keys, list(buffers), soon()).all()
    np.testing.assert_array_equal(buffers, blocks)
    store.delete(keys, soon())
    assert not store.exists(keys[::50], soon()).any()


def test_a_batch_larger_than_any_window(store: RemoteStore) -> None:
    keys, value = new_keys(12), block(BLOCK_BYTES)
    assert store.put(keys, [value] * 12, soon()).all()
    buffers = np.zeros((12, BLOCK_BYTES), np.uint8)
    assert store.get(keys, list(buffers), soon()).all()
    assert (buffers == value).all()
    store.delete(keys, soon())


def test_empty_batches_and_repeated_keys(store: RemoteStore) -> None:
    assert store.exists([], soon()).shape == (0,)
    assert store.get([], [], soon()).shape == (0,)
    assert store.put([], [], soon()).shape == (0,)
    store.delete([], soon())
    (key,) = new_keys(1)
    value = block(300)
    assert store.put([key, key], [value, value], soon()).any()
    buffers = np.zeros((2, 300), np.uint8)
    assert store.get([key, key], list(buffers), soon()).all()
    assert (buffers == value).all()
    store.delete([key, key], soon())


def test_a_buffer_of_another_size_is_a_miss(store: RemoteStore) -> None:
    (key,) = new_keys(1)
    value = block(1000)
    assert store.put([key], [value], soon()).all()
    for size in (1, 999, 1001, 1000 + HEADER_BYTES, 100_000):
        assert read(store, key, size) is None
    np.testing.assert_array_equal(read(store, key, 1000), value)


def test_any_contiguous_buffer_will_do(store: RemoteStore) -> None:
    keys, value = new_keys(3), block(600)
    blocks = [value.reshape(20, 30), bytes(value), memoryview(value).cast("B", [6, 100])]
    assert store.put(keys, blocks, soon()).all()
    buffers = [bytearray(600), np.zeros(150, np.uint32), memoryview(np.zeros((2, 300), np.int8))]
    assert store.get(keys, buffers, soon()).all()
    assert all(bytes(b) == value.tobytes() for b in buffers)


def test_requests_that_make_no_sense_are_refused(store: RemoteStore) -> None:
    keys, buffer = new_keys(2), np.zeros(10, np.uint8)
    with pytest.raises(InvalidRequestError, match="2 keys came with 1 buffers"):
        store.get(keys, [buffer], soon())
    with pytest.raises(InvalidRequestError, match="buffer 0 cannot be written"):
        store.get(keys[:1], [bytes(10)], soon())
    with pytest.raises(InvalidRequestError, match="buffer 1 is not contiguous"):
        store.put(keys, [buffer, np.zeros(10, np.uint8)[::2]], soon())
    with pytest.raises(InvalidRequestError, match="buffer 0 is empty"):
        store.put(keys[:1], [b""], soon())
    for key in ("", "a", "../../etc/00", "a/b/XY", "a/b/abc", "a/b/c/00", "a/b/00\n", "a/b/" + "00" * 33):
        with pytest.raises(InvalidRequestError, match="is not a key"):
            store.exists([key], soon())


def test_values_that_cannot_be_trusted_are_misses(backend: RemoteBackend) -> None:
    good_key, other_key = new_keys(2)
    elsewhere = block_key("others", "model;layers=2", bytes.fromhex(good_key.rsplit("/", 1)[1]))
    payload = block(4000)
    value = make_header(good_key, memoryview(payload)) + payload.tobytes()
    assert backend.put([good_key, elsewhere], [payload, payload], soon()).all()

    def is_trusted(key: str, raw: bytes) -> bool:
        write_raw(backend, key, raw)
        num_bad = backend.num_bad_values
        trusted = read(backend, key, 4000) is not None
        assert backend.num_bad_values == num_bad + (not trusted)
        return trusted

    assert is_trusted(good_key, value)
    for position in (0, 5, 6, 8, 16, 24, 32, 63, HEADER_BYTES, HEADER_BYTES + 3999):
        flipped = bytearray(value)
        flipped[position] ^= 1 << random.randrange(8)
        assert not is_trusted(good_key, bytes(flipped)), f"byte {position}"
    for size in (1, HEADER_BYTES, HEADER_BYTES + 1, len(value) - 1):
        assert not is_trusted(good_key, value[:size]), f"the first {size} bytes"
    assert not is_trusted(good_key, value + b"\0")
    assert not is_trusted(good_key, bytes(len(value)))
    assert backend.put([other_key], [payload], soon()).all()
    assert not is_trusted(other_key, value), "the value of another block"
    assert not is_trusted(elsewhere, value), "the value of the same block of another namespace"
    assert backend.put([good_key], [payload], soon()).all(), "a bad value can be replaced"
    np.testing.assert_array_equal(read(backend, good_key, 4000), payload)


def test_threads_read_and_write_at_once(store: RemoteStore) -> None:
    """Every thread has its own blocks, and all of them overwrite and read one more: no read mixes two writes."""
    (shared,) = new_keys(1)
    own_keys = [new_keys(6) for _ in range(4)]
    failures: list[str] = []

    def run(index: int) -> None:
        keys = own_keys[index]
        for turn in range(6):
            number = 16 * index + turn
            blocks = np.full((7, 100_000), number, np.uint8)
            buffers = np.zeros_like(blocks)
            if not store.put([*keys, shared], list(blocks), soon())[:6].all():
                failures.append(f"put {number}")
            found = store.get([*keys, shared], list(buffers), soon())
            if not found[:6].all() or not (buffers[:6] == number).all():
                failures.append(f"get {number}: {found}")
            if found[6] and len(set(buffers[6].tolist())) != 1:
                failures.append("a mixed block")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_another_store_reads_what_one_has_written(place: Place, backend: RemoteBackend) -> None:
    keys, blocks = new_keys(4), [block(50_000) for _ in range(4)]
    assert backend.put(keys, blocks, soon()).all()
    with place.open_another() as other:
        for key, value in zip(keys, blocks, strict=True):
            np.testing.assert_array_equal(read(other, key, 50_000), value)
        other.delete(keys[:1], soon())
        assert backend.exists(keys, soon()).tolist() == [False, True, True, True]


def test_a_deadline_that_has_passed_is_an_error(backend: RemoteBackend) -> None:
    keys, buffer = new_keys(1), np.zeros(100, np.uint8)
    for call in (
        lambda: backend.exists(keys, soon(-1)),
        lambda: backend.get(keys, [buffer], soon(-1)),
        lambda: backend.put(keys, [buffer], soon(-1)),
        lambda: backend.delete(keys, soon(-1)),
    ):
        with pytest.raises(RemoteTimeoutError):
            call()
    assert not backend.ping(soon(-1))


def test_a_closed_store_is_closed_and_leaves_no_thread(place: Place) -> None:
    before = set(threading.enumerate())
    store = place.open_another()
    (key,) = new_keys(1)
    store.put([key], [block(100)], soon())
    store.close()
    store.close()
    assert not store.ping(soon())
    with pytest.raises(RemoteStoreError, match="closed"):
        store.get([key], [np.zeros(100, np.uint8)], soon())
    assert set(threading.enumerate()) <= before


@pytest.fixture(params=SERVERS)
def mortal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place with a server of its own, to be killed."""
    with ExitStack() as stack:
        yield make_place(request.param, tmp_path, stack)


def works(store: RemoteStore, seconds: float) -> bool:
    (key,) = new_keys(1)
    value, buffer = block(10_000), np.zeros(10_000, np.uint8)
    is_stored = store.put([key], [value], soon(seconds))[0]
    is_found = store.get([key], [buffer], soon(seconds))[0]
    assert not is_found or (buffer == value).all()
    return bool(is_stored and is_found)


def test_a_server_that_comes_back_is_used_again(mortal: Place) -> None:
    assert mortal.server is not None
    with open_remote_store(mortal.url, block_bytes=BLOCK_BYTES, resilience=IMPATIENT) as store:
        eventually(lambda: works(store, 20.0))
        mortal.server.kill()
        assert not works(store, 0.5)
        assert not store.exists(new_keys(1), soon(0.5))[0]
        store.delete(new_keys(1), soon(0.5))
        assert not store.ping(soon(0.5))
        assert store.stats().failures > 0
        mortal.server.start()
        eventually(lambda: works(store, 20.0))
        assert store.ping(soon())


def test_a_server_that_is_started_later_is_found(mortal: Place) -> None:
    assert mortal.server is not None
    mortal.server.kill()
    with open_remote_store(mortal.url, block_bytes=BLOCK_BYTES, resilience=IMPATIENT) as store:
        assert not store.exists(new_keys(1), soon(0.5))[0]
        mortal.server.start()
        eventually(lambda: works(store, 20.0))
