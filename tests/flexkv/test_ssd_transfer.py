"""What io_uring and the thread pool promise alike: batches arrive byte for byte, and trouble is told per block."""

import errno
import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flexkv.ssd_memory import TIMEOUT_S, Pool, ids

from flexkv import _native
from flexkv.storage.ssd_files import SsdFiles

BACKENDS = ["io_uring", "threads"]
SHAPES = [(4096, 4096), (4096, 8192), (5000, 5000), (5000, 8192), (20480, 20480), (20481, 20481)]
"""(bytes of a block, stride of the pool): whole sectors or not, in place or through aligned buffers, cut or joined."""


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def make_files(directory: Path, num_files: int, num_slots: int, block_bytes: int) -> list[Path]:
    directories = [directory / str(i) for i in range(num_files)]
    for path in directories:
        path.mkdir()
    return SsdFiles(directories, num_slots, block_bytes).paths


@st.composite
def batches(draw, num_slots: int, num_blocks: int):
    size = draw(st.integers(0, min(num_slots, num_blocks)))
    # Runs of neighbours are as likely as scattered blocks.
    if draw(st.booleans()):
        first_slot, first_block = draw(st.integers(0, num_slots - size)), draw(st.integers(0, num_blocks - size))
        return list(range(first_slot, first_slot + size)), list(range(first_block, first_block + size))
    pick = [st.permutations(range(n)) for n in (num_slots, num_blocks)]
    return draw(pick[0])[:size], draw(pick[1])[:size]


@pytest.mark.parametrize("backend_name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_batches_agree_with_a_model(backend_name, data):
    num_slots, num_blocks = 11, 9
    block_bytes, stride = data.draw(st.sampled_from(SHAPES))
    num_files = data.draw(st.integers(1, 3))
    options = {
        "queue_depth": data.draw(st.sampled_from([1, 2, 8])),
        "io_bytes": data.draw(st.sampled_from([4096, 16384])),
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    pool = Pool(num_blocks, block_bytes, stride)
    stored: dict[int, tuple[bytes, int]] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = make_files(Path(directory), num_files, num_slots, block_bytes)
        transfer = pool.open(paths, num_slots, backend_name, **options)
        assert transfer.backend == backend_name
        for _ in range(data.draw(st.integers(1, 5))):
            pool.blocks[:] = rng.integers(0, 256, pool.blocks.shape, np.uint8)
            slots, blocks = data.draw(batches(num_slots, num_blocks))
            status, checksums = transfer.write(ids(slots), ids(blocks), TIMEOUT_S)
            assert status.tolist() == [0] * len(slots)
            for slot, block, checksum in zip(slots, blocks, checksums.tolist(), strict=True):
                stored[slot] = (pool.blocks[block].tobytes(), checksum)
                assert checksum == xxhash.xxh3_64_intdigest(stored[slot][0])

            pool.blocks[:] = 0
            slots, blocks = data.draw(batches(num_slots, num_blocks))
            known = [(slot, block) for slot, block in zip(slots, blocks, strict=True) if slot in stored]
            slots, blocks = [slot for slot, _ in known], [block for _, block in known]
            wanted = np.array([stored[slot][1] for slot in slots], np.uint64)
            assert transfer.read(ids(slots), ids(blocks), wanted, TIMEOUT_S).tolist() == [0] * len(slots)
            for slot, block in known:
                assert pool.blocks[block].tobytes() == stored[slot][0]
            rest = np.delete(pool.blocks, blocks, axis=0)
            assert not rest.any(), "a block nobody named was written"


def test_a_slot_lies_where_the_layout_says(backend, tmp_path):
    pool = Pool(6, 5000)
    pool.blocks[:] = np.arange(6, dtype=np.uint8)[:, None] + 1
    paths = make_files(tmp_path, 2, 6, 5000)
    transfer = pool.open(paths, 6, backend)
    assert not transfer.write(ids(range(6)), ids(range(6)), TIMEOUT_S)[0].any()
    transfer.sync()
    for slot in range(6):
        slot_content = paths[slot % 2].read_bytes()[slot // 2 * 8192 :][:8192]
        assert slot_content == bytes([slot + 1]) * 5000 + bytes(3192)


def test_a_flipped_bit_is_told_and_only_for_its_block(backend, tmp_path):
    pool = Pool(8, 8192)
    pool.blocks[:] = np.random.default_rng(0).integers(0, 256, pool.blocks.shape, np.uint8)
    (path,) = make_files(tmp_path, 1, 8, 8192)
    transfer = pool.open([path], 8, backend)
    _, checksums = transfer.write(ids(range(8)), ids(range(8)), TIMEOUT_S)
    with path.open("r+b") as file:
        file.seek(3 * 8192 + 77)
        byte = file.read(1)[0]
        file.seek(3 * 8192 + 77)
        file.write(bytes([byte ^ 16]))
    status = transfer.read(ids(range(8)), ids(range(8)), checksums, TIMEOUT_S)
    assert status.tolist() == [0, 0, 0, errno.EBADMSG, 0, 0, 0, 0]


def test_a_file_cut_short_fails_the_blocks_beyond_its_end(backend, tmp_path):
    pool = Pool(4, 8192)
    (path,) = make_files(tmp_path, 1, 4, 8192)
    transfer = pool.open([path], 4, backend)
    _, checksums = transfer.write(ids(range(4)), ids(range(4)), TIMEOUT_S)
    with path.open("r+b") as file:
        file.truncate(8192 + 4096)
    status = transfer.read(ids(range(4)), ids(range(4)), checksums, TIMEOUT_S)
    assert status.tolist() == [0, errno.EIO, errno.EIO, errno.EIO]


def test_a_deadline_in_the_past_ends_every_block(backend, tmp_path):
    pool = Pool(64, 65536)
    paths = make_files(tmp_path, 2, 64, 65536)
    transfer = pool.open(paths, 64, backend)
    status, _ = transfer.write(ids(range(64)), ids(range(64)), 0.0)
    assert set(status.tolist()) <= {0, errno.ETIMEDOUT}
    status, checksums = transfer.write(ids(range(64)), ids(range(64)), TIMEOUT_S)
    assert not status.any()
    assert not transfer.read(ids(range(64)), ids(range(64)), checksums, TIMEOUT_S).any()


def test_memory_is_a_file_system_like_any_other(backend):
    directory = Path("/dev/shm")
    if not directory.is_dir() or shutil.disk_usage(directory).free < 2**24:
        pytest.skip("no tmpfs here")
    with tempfile.TemporaryDirectory(dir=directory) as name:
        pool = Pool(4, 4096)
        transfer = pool.open(make_files(Path(name), 1, 4, 4096), 4, backend)
        assert transfer.is_direct or any("page cache" in reason for reason in transfer.fallbacks)
        status, checksums = transfer.write(ids(range(4)), ids(range(4)), TIMEOUT_S)
        assert not status.any()
        assert not transfer.read(ids(range(4)), ids(range(4)), checksums, TIMEOUT_S).any()


def test_only_an_aligned_pool_goes_without_copies(tmp_path):
    for (block_bytes, stride), is_bounced in zip(SHAPES, [False, False, True, False, False, True], strict=True):
        directory = tmp_path / f"{block_bytes}-{stride}"
        directory.mkdir()
        pool = Pool(2, block_bytes, stride)
        transfer = pool.open(make_files(directory, 1, 2, block_bytes), 2, "threads")
        assert transfer.is_bounced == is_bounced
        assert any("multiples of 4096" in reason for reason in transfer.fallbacks) == is_bounced


def test_what_makes_no_sense_is_refused(backend, tmp_path):
    pool = Pool(4, 4096)
    paths = make_files(tmp_path, 1, 4, 4096)
    transfer = pool.open(paths, 4, backend)
    for slots, blocks in (([4], [0]), ([-1], [0]), ([0], [4])):
        with pytest.raises(IndexError):
            transfer.write(ids(slots), ids(blocks), TIMEOUT_S)
    for slots, blocks in (([0, 1], [0]), ([1, 1], [0, 1])):
        with pytest.raises(ValueError, match=r"slots and|twice"):
            transfer.write(ids(slots), ids(blocks), TIMEOUT_S)
    for timeout in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout_s"):
            transfer.write(ids([0]), ids([0]), timeout)
    for options in ({"io_bytes": 1000}, {"queue_depth": 0}, {"num_threads": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pool.open(paths, 4, backend, **options)
    with pytest.raises(ValueError, match="backend is"):
        pool.open(paths, 4, "aio")
    with pytest.raises(OSError, match="its slots need"):
        pool.open(paths, 5, backend)
    with pytest.raises(FileNotFoundError):
        pool.open([tmp_path / "nothing"], 4, backend)


def test_the_checksum_is_xxh3_of_any_length():
    rng = np.random.default_rng(0)
    lengths = itertools.chain(range(300), [1023, 1024, 1025, 65536, 65537, 1835008])
    for length in lengths:
        data = rng.integers(0, 256, length, np.uint8)
        assert _native.checksum(data) == xxhash.xxh3_64_intdigest(data.tobytes())
    assert _native.checksum_isa() in ("avx512", "avx2", "portable")
