"""Keys, the format of values, and URLs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.errors import ConfigError, InvalidRequestError
from flexkv.storage.remote import redis, s3
from flexkv.storage.remote.factory import open_backend, open_remote_store
from flexkv.storage.remote.keys import block_key, key_hash, require_keys
from flexkv.storage.remote.url import parse_url
from flexkv.storage.remote.value import HEADER_BYTES, is_intact, make_header

NAMESPACES = st.none() | st.text(max_size=200) | st.lists(st.text(max_size=60), max_size=4).map(tuple)
FINGERPRINTS = st.text(min_size=1, max_size=200)
HASHES = st.binary(min_size=1, max_size=32)
IDENTITIES = st.tuples(NAMESPACES, FINGERPRINTS, HASHES)


def test_keys_are_spelled_as_documented() -> None:
    digest = bytes(range(32))
    assert block_key(None, "v1;layers=28", digest) == f"_common/v1_3blayers_3d28/{digest.hex()}"
    assert block_key("Team-7", "m", digest) == f"Team-7/m/{digest.hex()}"
    assert block_key(("a", "b.c", ""), "m", b"\x0a") == "a.b_2ec._/m/0a"
    assert block_key("..", "/", b"\x0a") == "_2e_2e/_2f/0a"
    assert block_key("é_", "m", b"\x0a") == "_c3_a9_5f/m/0a"
    assert len(block_key("x" * 500, "y" * 500, digest)) < 250


@settings(deadline=None)
@given(IDENTITIES, IDENTITIES)
def test_different_blocks_have_different_keys(one: tuple, other: tuple) -> None:
    def identity(namespace, fingerprint: str, digest: bytes) -> tuple:
        labels = (namespace,) if isinstance(namespace, str) else tuple(namespace or ())
        return labels, fingerprint, digest

    assert (block_key(*one) == block_key(*other)) == (identity(*one) == identity(*other))


@settings(deadline=None)
@given(st.lists(st.text("ab_.%", max_size=3), max_size=3).map(tuple), st.lists(st.text("ab_.%", max_size=3)).map(tuple))
def test_labels_do_not_run_into_each_other(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (block_key(one, "m", b"1") == block_key(other, "m", b"1")) == (one == other)


@settings(deadline=None)
@given(IDENTITIES)
def test_keys_are_accepted_and_carry_the_hash(identity: tuple) -> None:
    key = block_key(*identity)
    require_keys([key])
    assert key_hash(key) == identity[2]
    assert all(part not in (".", "..") and len(part) < 256 for part in key.split("/"))


def test_what_cannot_be_a_key_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="fingerprint"):
        block_key(None, "", b"1")
    for digest in (b"", bytes(33)):
        with pytest.raises(InvalidRequestError, match=r"1\.\.32 bytes"):
            block_key(None, "m", digest)
    with pytest.raises(InvalidRequestError, match="namespace"):
        block_key(7, "m", b"1")  # type: ignore[arg-type]


def test_the_format_of_a_value_does_not_change() -> None:
    key = block_key("ns", "model", bytes(range(32)))
    header = make_header(key, memoryview(b"payload"))
    assert HEADER_BYTES == 64
    assert header.hex() == (
        "4b56534201002000" + "0700000000000000" + "9f5c94d75026a3a1" + "00" * 8 + bytes(range(32)).hex()
    )
    short = make_header(block_key("ns", "model", b"\x01\x02"), memoryview(b"p"))
    assert short[6:8] + short[32:] == b"\x02\0" + b"\x01\x02" + bytes(30)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 263), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(payload: bytes, position: int, bit: int) -> None:
    key = block_key("ns", "model", bytes(32))
    value = bytearray(make_header(key, memoryview(payload)) + payload)
    assert is_intact(value[:64], key, memoryview(value)[64:])
    value[position % len(value)] ^= 1 << bit
    assert not is_intact(value[:64], key, memoryview(value)[64:])


# -- URLs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "unknown scheme ''; allowed are file://, redis://, rediss://, unix://, s3://, mooncake://"),
        ("/mnt/kv", "unknown scheme"),
        ("ftp://user:secret@host/x", "'ftp://host/x' has the unknown scheme 'ftp'"),
        ("redis://host:port/0", "not a remote URL"),
        ("redis://user:secret@host:99999/0", "'host:99999/0' is not a remote URL"),
        ("redis://[::1/0", "not a remote URL"),
        ("file://host/mnt/kv", "names a host"),
        ("file://", "names no directory"),
        ("file:///", "names no directory"),
        ("file:///mnt/kv?fsync=maybe", "fsync='maybe' is not allowed; it must be one of 1, true, yes, 0, false, no"),
        ("file:///mnt/kv?fsnyc=1", "no option 'fsnyc'; a file URL takes fsync"),
        ("file:///mnt/kv?fsync=1&fsync=0", "more than once"),
        ("file:///mnt/kv?fsync", "not a remote URL"),
        ("file:///mnt/kv#part", "fragment"),
        ("redis://", "names no host"),
        ("redis://host/kv", "names a database that is no number"),
        (
            "redis://host/0?max_connections=0",
            "max_connections='0' is not allowed; it must be a whole number within 1..1024",
        ),
        ("redis://host/0?window_mb=-1", "window_mb='-1'"),
        ("redis://host/0?ttl_s=1.5", "ttl_s='1.5'"),
        ("redis://host/0?ca_certs=x", "no option 'ca_certs'"),
        ("rediss://host/0?verify=2", "verify='2'"),
        ("unix://host/socket", "names no socket"),
        ("unix:///run/redis.sock?db=x", "db='x'"),
        ("s3://", "names no bucket"),
        ("s3://bucket:80/prefix", "names no bucket"),
        ("s3://key:secret@bucket/prefix", "'s3://bucket/prefix' has a user before its bucket"),
        ("s3://bucket?concurrency=many", "concurrency='many'"),
        ("s3://bucket?secret=x", "no option 'secret'; a s3 URL takes access_key_id, anonymous"),
        ("mooncake://host", "does not name the master's host and port"),
        ("mooncake://host:1/x", "has a path"),
        ("mooncake://user@host:1", "names a user"),
        ("mooncake://host:1?protocol=udp", "protocol='udp' is not allowed; it must be one of tcp, rdma"),
        ("mooncake://host:1?segment_gb=1", "no option 'segment_gb'"),
    ],
)
def test_bad_urls_are_refused_by_name(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_remote_store(url, block_bytes=100)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value).replace("'secret'", "").replace("secret_access_key", "")


def test_passwords_are_not_shown() -> None:
    url = parse_url("redis://user:hunter2@host/0?ttl_s=5")
    assert (url.username, url.password) == ("user", "hunter2")
    assert "hunter2" not in repr(url)


def test_block_size_must_make_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block_bytes=0"):
        open_backend(f"file://{tmp_path}", block_bytes=0)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(redis, "_is_installed", False)
    monkeypatch.setattr(s3, "_is_installed", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mooncake" else find_spec(name))
    for url, extra in (
        ("redis://host/0", "redis"),
        ("rediss://host/0", "redis"),
        ("unix:///run/redis.sock", "redis"),
        ("s3://bucket", "s3"),
        ("mooncake://host:1", "mooncake"),
    ):
        with pytest.raises(ConfigError, match=rf"install kvstrata\[{extra}\]"):
            open_backend(url, block_bytes=100)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "sub", tmp_path / "file", Path("/proc/kv")):
        with pytest.raises(ConfigError, match="cannot be written"):
            open_backend(f"file://{path}", block_bytes=100)


def test_percent_escapes_in_paths_are_undone(tmp_path: Path) -> None:
    key, value = block_key(None, "m", b"1"), np.ones(10, np.uint8)
    deadline = float("inf")
    with open_backend(f"file://{tmp_path}/a%20b%3fc", block_bytes=10) as store:
        assert store.put([key], [value], deadline).all()
    assert (tmp_path / "a b?c" / "blocks").is_dir()
