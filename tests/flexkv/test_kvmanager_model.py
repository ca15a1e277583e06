"""Random puts, gets, cancels, resets and restarts in a store too small for them: never a wrong byte, nothing lost."""

import tempfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.flexkv.device_memory import BLOCK, MODEL, fill_block, make_kv_caches, read_block, slots_of

from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig, SsdTierConfig
from flexkv.common.request import ResponseStatus
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

NUM_DEVICE_BLOCKS = 40
# Sequences of one to five blocks over two kinds of block, so that prefixes are shared; some have a tail.
SEQUENCES = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=5)
NAMESPACES = st.sampled_from([None, "tenant"])


def tokens_of(kinds: list[int]) -> np.ndarray:
    return np.repeat(np.array(kinds), BLOCK)


def seed_of(kinds: list[int], namespace: str | None) -> int:
    return zlib.crc32(bytes(kinds) + (namespace or "").encode())


class StoreMachine(RuleBasedStateMachine):
    """The device holds scratch blocks; what a block must contain follows from its prefix and namespace."""

    cache = CacheConfig(CpuTierConfig(num_blocks=7), BLOCK, EvictionConfig(evict_ratio=0.2))

    def __init__(self) -> None:
        super().__init__()
        self.kv_caches = make_kv_caches(MODEL, NUM_DEVICE_BLOCKS, BLOCK)
        self.free = list(range(NUM_DEVICE_BLOCKS))
        self.launched: dict[int, tuple[str, list[int], list[int], str | None]] = {}
        self.open()

    def open(self) -> None:
        self.stack = ExitStack()
        self.store = self.stack.enter_context(KVManager(MODEL, self.cache))
        client = self.stack.enter_context(KVTPClient(self.store.device_dir, 0, MODEL, BLOCK))
        client.register(self.kv_caches)
        assert self.store.wait_ready(20.0)

    def teardown(self) -> None:
        self.settle()
        self.store.check_integrity()
        self.stack.close()

    def take(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        return [self.free.pop() for _ in range(count)]

    def covered(self, mask: np.ndarray) -> tuple[int, int]:
        return int(mask.argmax()) // BLOCK, int(mask.sum()) // BLOCK

    def launch(self, kind: str, task: int, mask: np.ndarray, kinds: list[int], namespace: str | None) -> None:
        first, count = self.covered(mask)
        blocks = self.take(count)
        if count == 0 or blocks is None:
            self.store.cancel([task])
            return
        for i, block in enumerate(blocks, start=first):
            fill_block(self.kv_caches, block, seed_of(kinds[: i + 1], namespace) if kind == "put" else 1)
        self.store.launch([task], [slots_of(blocks)])
        self.launched[task] = (kind, blocks, kinds[: first + count], namespace)

    @rule(kinds=SEQUENCES, namespace=NAMESPACES)
    def put(self, kinds, namespace):
        task, mask = self.store.put_match(tokens_of(kinds), None, namespace)
        self.launch("put", task, mask, kinds, namespace)

    @rule(kinds=SEQUENCES, namespace=NAMESPACES, on_device=st.integers(0, 2))
    def get(self, kinds, namespace, on_device):
        tokens = tokens_of(kinds)
        wanted = np.arange(len(tokens)) >= on_device * BLOCK
        task, mask = self.store.get_match(tokens, wanted, namespace)
        assert not mask[: on_device * BLOCK].any()
        self.launch("get", task, mask, kinds, namespace)

    @rule(kinds=SEQUENCES, namespace=NAMESPACES, is_put=st.booleans())
    def match_and_think_again(self, kinds, namespace, is_put):
        match = self.store.put_match if is_put else self.store.get_match
        task, _ = match(tokens_of(kinds), None, namespace)
        self.store.cancel([task])

    # Which tasks exist depends on timing, so rules pick by number and do nothing where there is none.
    @rule(number=st.integers(0, 7))
    def cancel(self, number):
        for task in list(self.launched)[number : number + 1]:
            self.store.cancel([task])
            self.end(task)

    @rule(number=st.integers(0, 7))
    def wait(self, number):
        for task in list(self.launched)[number : number + 1]:
            self.end(task)

    @rule()
    def reset(self):
        if not self.launched:
            assert self.store.drain()
            assert self.store.reset()
            stats = self.store.stats()
            assert stats.num_cached_blocks == stats.num_ssd_cached_blocks == 0

    @rule()
    def everything_ends(self):
        self.settle()

    def settle(self) -> None:
        for task in list(self.launched):
            self.end(task)
        assert self.store.drain()
        stats = self.store.stats()
        assert stats.num_in_flight_blocks == 0
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_total_blocks

    def end(self, task: int) -> None:
        if task not in self.launched:
            return
        kind, blocks, kinds, namespace = self.launched.pop(task)
        response = self.store.wait([task], timeout=20.0, completely=True)[task]
        assert response.status in (ResponseStatus.SUCCESS, ResponseStatus.CANCELLED)
        if kind == "get" and response.ok:
            for i, block in enumerate(blocks, start=len(kinds) - len(blocks)):
                actual = read_block(self.kv_caches, block)
                fill_block(self.kv_caches, block, seed_of(kinds[: i + 1], namespace))
                assert actual == read_block(self.kv_caches, block), "wrong bytes"
        self.free.extend(blocks)

    @invariant()
    def never_more_than_the_pool(self):
        stats = self.store.stats()
        assert stats.num_cached_blocks <= stats.num_total_blocks


class StoreWithSsdMachine(StoreMachine):
    """Most of what is stored is on the SSD only, and survives a restart."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        ssd = SsdTierConfig((Path(self.directory.name),), num_blocks=12)
        self.cache = CacheConfig(CpuTierConfig(num_blocks=4), BLOCK, EvictionConfig(evict_ratio=0.0), ssd=ssd)
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()

    @rule()
    def restart(self) -> None:
        self.settle()
        num_stored = self.store.stats().num_ssd_cached_blocks
        self.stack.close()
        self.open()
        # Blocks that were evicted, and whose slots nobody has used since, are there again.
        assert self.store.stats().num_ssd_cached_blocks >= num_stored


TestStoreWithSsdMachine = StoreWithSsdMachine.TestCase
TestStoreWithSsdMachine.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
