"""Directories as remote stores: writers that are killed, what lies about, short and failing I/O."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.flexkv.remote_servers import soon

from flexkv.storage.remote.base import RemoteStoreError, RemoteTimeoutError
from flexkv.storage.remote.factory import open_backend
from flexkv.storage.remote.keys import block_key
from flexkv.storage.remote.posix import PosixStore

ROOT = Path(__file__).resolve().parents[2]
BLOCK_BYTES = 2_000_000
KEY = block_key(None, "m", bytes(range(32)))

WRITER = """
import sys
import numpy as np
from pathlib import Path
from flexkv.storage.remote.posix import PosixStore
store = PosixStore(Path(sys.argv[1]))
turn = 0
while True:
    turn += 1
    assert store.put([sys.argv[2]], [np.full(int(sys.argv[3]), turn % 251, np.uint8)], float("inf")).all()
    if turn == 1:
        print("writing", flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PosixStore]:
    with PosixStore(tmp_path) as store:
        yield store


def read(store: PosixStore, size: int = BLOCK_BYTES, key: str = KEY) -> np.ndarray | None:
    buffer = np.zeros(size, np.uint8)
    return buffer if store.get([key], [buffer], soon())[0] else None


def unfinished(directory: Path) -> list[Path]:
    return [path for path in (directory / "writing").glob("*/*") if path.name != "lock"]


def test_no_reader_sees_half_a_block_of_a_writer_that_is_killed(tmp_path: Path) -> None:
    with PosixStore(tmp_path) as store:
        for num_reads in (1, 4, 9, 13):
            arguments = [sys.executable, "-c", WRITER, str(tmp_path), KEY, str(BLOCK_BYTES)]
            environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
            writer = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment)
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            for _ in range(num_reads):
                value = read(store)
                assert value is not None
                assert (value == value[0]).all()
            writer.kill()
            writer.wait()
            writer.stdout.close()
            value = read(store)
            assert value is not None, "what was there before stays"
            assert (value == value[0]).all()
        assert store.num_bad_values == 0
        assert len(list((tmp_path / "writing").iterdir())) == 2, "ours, and that of the last one killed"
        with PosixStore(tmp_path):
            assert len(list((tmp_path / "writing").iterdir())) == 2, "the dead are swept, the living are not"
            assert store.ping(soon())
        assert unfinished(tmp_path) == []
        assert store.put([KEY], [np.ones(10, np.uint8)], soon()).all()
    assert list((tmp_path / "writing").iterdir()) == []


def test_what_a_dead_writer_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "writing" / "0123456789abcdef"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "17").write_bytes(b"half a block")
    (tmp_path / "writing" / "without-lock").mkdir()
    (tmp_path / "writing" / "stray-file").touch()
    with PosixStore(tmp_path) as store:
        assert store.ping(soon())
        assert {path.name for path in (tmp_path / "writing").iterdir()} == {
            store._writing._directory.name,
            "stray-file",
        }


def test_blocks_are_fanned_out_over_two_levels(store: PosixStore, tmp_path: Path) -> None:
    assert store.put([KEY], [np.ones(10, np.uint8)], soon()).all()
    assert (tmp_path / "blocks" / "_common" / "m" / "00" / "01" / bytes(range(32)).hex()).stat().st_size == 74
    short = block_key(None, "m", b"\x05")
    assert store.put([short], [np.ones(10, np.uint8)], soon()).all()
    assert read(store, 10, short) is not None


def test_pipes_directories_and_links_in_the_place_of_blocks_are_misses(store: PosixStore, tmp_path: Path) -> None:
    keys = [block_key(None, "m", bytes([i, 0, 1])) for i in range(4)]
    paths = [Path(store._path(key)) for key in keys]
    for path in paths:
        path.parent.mkdir(parents=True)
    os.mkfifo(paths[0])
    paths[1].mkdir()
    paths[2].symlink_to(paths[2])
    paths[3].symlink_to("/dev/zero")
    buffers = [np.zeros(10, np.uint8) for _ in keys]
    assert not store.get(keys, buffers, soon()).any()
    assert not store.exists(keys, soon()).any()
    assert store.put([keys[0], keys[3]], buffers[:2], soon()).all()
    with pytest.raises(RemoteStoreError) as caught:
        store.put([keys[1], KEY], buffers[:2], soon())
    assert caught.value.done.tolist() == [False, True]


def test_short_reads_and_writes_are_continued(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writev, readv = os.writev, os.readv
    value = np.random.default_rng(1).integers(0, 256, 1000, np.uint8)
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [parts[0][:13]]))
    monkeypatch.setattr(os, "readv", lambda fd, parts: readv(fd, [parts[0][:7]]))
    assert store.put([KEY], [value], soon()).all()
    np.testing.assert_array_equal(read(store, 1000), value)
    monkeypatch.setattr(os, "readv", lambda fd, parts: 0)
    assert read(store, 1000) is None, "the file shrank while it was read"


def test_a_full_disk_stores_nothing_and_leaves_nothing(
    store: PosixStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.put([KEY], [np.ones(10, np.uint8)], soon()).all()

    def fail(fd: int, parts: list[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", fail)
        assert not store.put([KEY], [np.zeros(10, np.uint8)], soon()).any()
    assert unfinished(tmp_path) == []
    assert read(store, 10) is not None, "the old value stays"


def test_a_block_that_cannot_be_read_does_not_hide_the_others(
    store: PosixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [block_key(None, "m", bytes([i])) for i in range(3)]
    assert store.put(keys, [np.ones(10, np.uint8)] * 3, soon()).all()
    bad, real_open = store._path(keys[1]), os.open

    def fail(path: str, *arguments: int, **options: int) -> int:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(RemoteStoreError) as caught:
        store.get(keys, [np.zeros(10, np.uint8) for _ in keys], soon())
    assert caught.value.is_transient
    assert caught.value.done.tolist() == [True, False, True]


def test_a_batch_ends_at_its_deadline(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [block_key(None, "m", bytes([i])) for i in range(3)]
    now = [0.0]
    real_open = os.open

    def open_slowly(path: str, *arguments: int, **options: int) -> int:
        now[0] += 1.0
        return real_open(path, *arguments, **options)

    assert store.put(keys, [np.ones(10, np.uint8)] * 3, soon()).all()
    monkeypatch.setattr("flexkv.storage.remote.base.time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "open", open_slowly)
    with pytest.raises(RemoteTimeoutError) as caught:
        store.get(keys, [np.zeros(10, np.uint8) for _ in keys], 1.5)
    monkeypatch.undo()
    assert caught.value.done.tolist() == [True, True, False]


def test_a_store_whose_directory_was_removed_says_so(store: PosixStore, tmp_path: Path) -> None:
    directory = store._writing._directory
    (directory / "lock").unlink()
    directory.rmdir()
    assert not store.ping(soon())
    with pytest.raises(RemoteStoreError, match="No such file"):
        store.put([KEY], [np.ones(10, np.uint8)], soon())
    assert read(store, 10) is None


def test_blocks_synced_to_disk_are_blocks_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with open_backend(f"file://{tmp_path}?fsync=yes", block_bytes=10) as store:
        assert store.put([KEY], [np.ones(10, np.uint8)], soon()).all()
        assert len(synced) == 2, "the file, and the directory that names it"
        assert store.exists([KEY], soon()).all()
