"""KVManager with a small CPU tier and an SSD tier: real files, real device workers, byte by byte."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.flexkv.device_memory import BLOCK, MODEL, fill_block, make_kv_caches, read_block, slots_of

from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig, SsdTierConfig
from flexkv.common.request import ResponseStatus
from flexkv.errors import ConfigError
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient
from kvblocks.events import BlockStored

NUM_DEVICE_BLOCKS = 24


class Store:
    """A store of four blocks of memory and sixteen on disk, beside an engine of its own."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        ssd = SsdTierConfig((directory,), num_blocks=16)
        cache = CacheConfig(CpuTierConfig(num_blocks=4), BLOCK, EvictionConfig(evict_ratio=0.0), ssd=ssd)
        self.manager = stack.enter_context(KVManager(MODEL, cache))
        self.kv_caches = make_kv_caches(MODEL, NUM_DEVICE_BLOCKS, BLOCK)
        client = stack.enter_context(KVTPClient(self.manager.device_dir, 0, MODEL, BLOCK))
        client.register(self.kv_caches)
        assert self.manager.wait_ready()

    def put(self, kind: int, num_blocks: int) -> int:
        """Store a sequence; returns how many blocks were new."""
        for i in range(num_blocks):
            fill_block(self.kv_caches, i, seed_of(kind, i))
        task, mask = self.manager.put_match(tokens_of(kind, num_blocks))
        num_new = int(mask.sum()) // BLOCK
        first = int(mask.argmax()) // BLOCK
        if num_new:
            self.manager.launch([task], [slots_of(list(range(first, first + num_new)))])
            response = self.manager.wait([task], completely=True)[task]
            assert response.status is ResponseStatus.SUCCESS
        assert self.manager.drain()
        return num_new

    def get(self, kind: int, num_blocks: int, at: int = 0) -> int:
        """Load a sequence to the device blocks from `at` on, and look at every byte; returns how many blocks came."""
        task, mask = self.manager.get_match(tokens_of(kind, num_blocks))
        num_found = int(mask.sum()) // BLOCK
        if num_found == 0:
            return 0
        blocks = list(range(at, at + num_found))
        for block in blocks:
            fill_block(self.kv_caches, block, seed=1)
        self.manager.launch([task], [slots_of(blocks)])
        if not self.manager.wait([task])[task].ok:
            return -1
        self.check(kind, blocks)
        return num_found

    def check(self, kind: int, blocks: list[int]) -> None:
        for i, block in enumerate(blocks):
            actual = read_block(self.kv_caches, block)
            fill_block(self.kv_caches, block, seed_of(kind, i))
            assert actual == read_block(self.kv_caches, block), f"block {i} of sequence {kind} is wrong"


def tokens_of(kind: int, num_blocks: int) -> np.ndarray:
    return kind * 1000 + np.arange(num_blocks * BLOCK)


def seed_of(kind: int, block: int) -> int:
    return kind * 100 + block


@contextmanager
def open_store(directory: Path) -> Iterator[Store]:
    with ExitStack() as stack:
        yield Store(directory, stack)


def test_what_left_the_memory_comes_from_the_disk(tmp_path):
    with open_store(tmp_path) as store:
        for kind in range(4):
            assert store.put(kind, 4) == 4
        assert [store.get(kind, 4) for kind in range(4)] == [4, 4, 4, 4]
        stats = store.manager.stats()
        assert stats.num_loaded == 16, "only the last sequence was in memory, until the first was loaded"
        assert stats.num_ssd_cached_blocks == 16
        store.manager.check_integrity()


def test_a_restart_finds_what_was_stored(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 4)
        store.put(2, 3)
    with open_store(tmp_path) as store:
        assert store.manager.stats().num_ssd_cached_blocks == 7
        assert [store.get(2, 3), store.get(1, 4)] == [3, 4]
        assert store.put(1, 4) == 0, "it is in memory again, and on the disk"
        assert store.manager.stats().num_ssd_stored == 0


def test_gets_at_once_share_one_load(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 4)
        store.put(2, 4)
        tasks = []
        for i in range(3):
            task, mask = store.manager.get_match(tokens_of(1, 4))
            assert mask.sum() == 4 * BLOCK
            tasks.append(task)
            store.manager.launch([task], [slots_of(list(range(4 * i, 4 * i + 4)))])
        assert all(response.ok for response in store.manager.wait(tasks).values())
        for i in range(3):
            store.check(1, list(range(4 * i, 4 * i + 4)))


def test_a_load_that_nobody_waits_for_stays_in_memory(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 4)
        store.put(2, 4)
        task, _ = store.manager.get_match(tokens_of(1, 4))
        store.manager.cancel([task])
        assert store.manager.drain()
        num_loaded = store.manager.stats().num_loaded
        assert store.get(1, 4) == 4
        assert store.manager.stats().num_loaded == num_loaded


def flip_a_bit_of_every_slot(directory: Path) -> None:
    (data,) = directory.glob("blocks-*.bin")
    content = bytearray(data.read_bytes())
    slot_bytes = len(content) // 16
    for slot in range(16):
        content[slot * slot_bytes + 5] ^= 1
    data.write_bytes(content)


def test_a_flipped_bit_is_never_served(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 4)
        store.put(2, 4)
    flip_a_bit_of_every_slot(tmp_path)
    with open_store(tmp_path) as store:
        assert store.get(1, 4) == -1, "the blocks were promised, but the load says that they are damaged"
        assert store.get(1, 4) == 0, "and they are not promised again"
        assert store.put(1, 4) == 4
        store.put(3, 4)
        assert store.get(1, 4) == 4
        store.manager.check_integrity()


def test_a_get_whose_load_has_failed_already_fails_at_once(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 4)
    flip_a_bit_of_every_slot(tmp_path)
    with open_store(tmp_path) as store:
        task, _ = store.manager.get_match(tokens_of(1, 4))
        assert store.manager.drain()
        store.manager.launch([task], [slots_of([0, 1, 2, 3])])
        assert store.manager.try_wait([task])[task].status is ResponseStatus.FAILED


def test_the_disk_is_announced_with_its_own_medium(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 3)
        stored = [event for event in store.manager.take_events() if isinstance(event, BlockStored)]
        assert [event.medium for event in stored] == ["CPU", "STORAGE"]
        assert stored[0].block_hashes == stored[1].block_hashes


def test_a_reset_empties_the_disk_for_good(tmp_path):
    with open_store(tmp_path) as store:
        store.put(1, 4)
        assert store.manager.reset()
        assert store.get(1, 4) == 0
    with open_store(tmp_path) as store:
        assert store.get(1, 4) == 0


def test_a_second_store_of_the_directory_is_refused(tmp_path):
    with open_store(tmp_path), pytest.raises(ConfigError, match="in use"), open_store(tmp_path):
        pass
