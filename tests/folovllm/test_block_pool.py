"""The block pool, against a naive model."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.folovllm.core_fakes import make_request

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from kvblocks.events import AllBlocksCleared, BlockRemoved, BlockStored
from kvblocks.hashing import external_hash

# Prompts of 4 blocks of one token each, over few tokens, so that equal prefixes are frequent.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=4)


def make_pool(num_blocks: int, block_size: int = 1) -> BlockPool:
    return BlockPool(num_blocks, block_size, enable_caching=True, enable_kv_cache_events=True)


def cache(pool: BlockPool, prompt: list[int], name: str = "r") -> list[KVCacheBlock]:
    """Blocks of a whole prompt, computed and hashed."""
    request = make_request(name, prompt, block_size=pool.block_size)
    blocks = pool.get_new_blocks(len(request.block_hashes))
    pool.cache_full_blocks(request, blocks, 0, len(blocks))
    return blocks


def free_ids(pool: BlockPool) -> list[int]:
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def test_block_zero_is_never_handed_out() -> None:
    pool = make_pool(4)
    assert pool.null_block.block_id == 0
    assert [block.block_id for block in pool.get_new_blocks(3)] == [1, 2, 3]
    assert pool.get_num_free_blocks() == 0
    assert pool.get_usage() == 1.0


def test_freed_blocks_without_content_are_reused_before_hashed_ones() -> None:
    pool = make_pool(6)
    hashed = cache(pool, [1, 2])
    plain = pool.get_new_blocks(2)
    pool.free_blocks(reversed(hashed))
    pool.free_blocks(plain)
    assert free_ids(pool) == [3, 4, 5, 2, 1]


def test_touch_saves_a_free_block_from_eviction() -> None:
    pool = make_pool(3)
    first, second = cache(pool, [1, 2])
    pool.free_blocks([second, first])
    pool.touch([first])
    assert pool.get_new_blocks(1) == [second]
    assert first.block_hash is not None
    assert second.block_hash is None


def test_equal_content_is_not_merged_and_survives_the_eviction_of_one_copy() -> None:
    pool = make_pool(3)
    (one,), (other,) = cache(pool, [1], "a"), cache(pool, [1], "b")
    block_hash = one.block_hash
    assert one is not other
    assert block_hash is not None
    assert pool.num_cached_blocks == 2
    pool.free_blocks([one])
    pool.get_new_blocks(1)
    assert pool.get_cached_block(block_hash) is other
    stored, removed = pool.take_events()[:2], pool.take_events()
    assert [type(event) for event in stored] == [BlockStored, BlockStored]
    assert removed == []


def test_events_say_what_vllm_says() -> None:
    pool = make_pool(8, block_size=2)
    request = make_request("r", [1, 2, 3, 4, 5], block_size=2, salt="s")
    hashes = [external_hash(block_hash) for block_hash in request.block_hashes]
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 1)
    pool.cache_full_blocks(request, blocks, 1, 2)
    pool.free_blocks(reversed(blocks))
    pool.get_new_blocks(6)
    first, second, removed = pool.take_events()
    assert isinstance(first, BlockStored)
    assert isinstance(second, BlockStored)
    assert (first.block_hashes, first.parent_block_hash, first.token_ids) == ([hashes[0]], None, [1, 2])
    assert (second.block_hashes, second.parent_block_hash, second.token_ids) == ([hashes[1]], hashes[0], [3, 4])
    assert (first.extra_keys, second.extra_keys) == ([("s",)], [None])
    assert (first.block_size, first.medium, first.group_idx) == (2, "GPU", 0)
    assert first.kv_cache_spec_kind == "full_attention"
    assert isinstance(removed, BlockRemoved)
    assert (removed.block_hashes, removed.medium) == ([hashes[1]], "GPU")
    assert pool.take_events() == []


def test_reset_is_refused_while_a_block_is_in_use() -> None:
    pool = make_pool(4)
    blocks = cache(pool, [1, 2])
    assert not pool.reset_prefix_cache()
    pool.free_blocks(blocks)
    pool.take_events()
    assert pool.reset_prefix_cache()
    assert pool.num_cached_blocks == 0
    assert pool.take_events() == [AllBlocksCleared()]


def test_reset_of_the_device_alone_does_not_announce_that_the_store_is_empty() -> None:
    pool = make_pool(4)
    blocks = cache(pool, [1, 2])
    hashes = [external_hash(block.block_hash) for block in blocks if block.block_hash]
    pool.free_blocks(blocks)
    pool.take_events()
    assert pool.reset_prefix_cache(other_tiers_remain=True)
    (event,) = pool.take_events()
    assert isinstance(event, BlockRemoved)
    assert sorted(event.block_hashes) == sorted(hashes)
    pool.check_integrity()


def test_evicted_content_is_not_found_but_its_holder_keeps_the_block() -> None:
    pool = make_pool(4)
    (block,) = cache(pool, [1])
    block_hash = block.block_hash
    assert block_hash is not None
    pool.evict_blocks([block])
    assert pool.get_cached_block(block_hash) is None
    assert block.ref_cnt == 1
    assert free_ids(pool) == [2, 3]


def test_freeing_twice_is_a_bug() -> None:
    pool = make_pool(3)
    (block,) = pool.get_new_blocks(1)
    pool.free_blocks([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_blocks([block])


class BlockPoolMachine(RuleBasedStateMachine):
    """Naive model: a list as the free queue, a list of (hash, block id), a count of references, a set fed by events."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = make_pool(num_blocks)
        self.free = list(range(1, num_blocks))
        self.hash_of: dict[int, bytes] = {}
        self.refs: Counter[int] = Counter()
        self.tables: list[list[int]] = []
        self.announced: Counter[int] = Counter()
        self.names = 0

    def blocks(self, ids: list[int]) -> list[KVCacheBlock]:
        return [self.pool.blocks[i] for i in ids]

    @rule(prompt=PROMPTS, num_hashed=st.integers(0, 4))
    def admit(self, prompt: list[int], num_hashed: int) -> None:
        """What a request does: hit its prefix, take new blocks for the rest, hash some of them."""
        self.names += 1
        request = make_request(f"r{self.names}", prompt, block_size=1)
        hit: list[int] = []
        for block_hash in request.block_hashes:
            block = self.pool.get_cached_block(block_hash)
            same = [i for i, known in self.hash_of.items() if known == block_hash]
            assert (block.block_id in same) if block is not None else not same
            if block is None:
                break
            hit.append(block.block_id)
        num_new = len(prompt) - len(hit)
        if num_new > len([i for i in self.free if i not in hit]):
            return
        self.pool.touch(self.blocks(hit))
        self.free = [i for i in self.free if i not in hit]
        new, self.free = self.free[:num_new], self.free[num_new:]
        assert [block.block_id for block in self.pool.get_new_blocks(num_new)] == new
        for i in new:
            self.hash_of.pop(i, None)
        table = hit + new
        num_full = max(len(hit), min(num_hashed, len(table)))
        self.pool.cache_full_blocks(request, self.blocks(table), len(hit), num_full)
        self.hash_of.update(zip(table[len(hit) : num_full], request.block_hashes[len(hit) : num_full], strict=True))
        self.refs.update(table)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free_blocks(reversed(self.blocks(table)))
        self.refs.subtract(table)
        idle = [i for i in reversed(table) if not self.refs[i]]
        self.free = [i for i in idle if i not in self.hash_of] + self.free + [i for i in idle if i in self.hash_of]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.evict_blocks(self.blocks(table))
        for i in table:
            self.hash_of.pop(i, None)

    @rule(other_tiers_remain=st.booleans())
    def reset(self, other_tiers_remain: bool) -> None:
        assert self.pool.reset_prefix_cache(other_tiers_remain=other_tiers_remain) == (not self.tables)
        if not self.tables:
            self.hash_of.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert free_ids(self.pool) == self.free
        assert {block.block_id: block.block_hash for block in self.pool.blocks if block.block_hash} == self.hash_of
        assert [block.ref_cnt for block in self.pool.blocks] == [self.refs[i] for i in range(self.pool.num_gpu_blocks)]

    @invariant()
    def a_listener_knows_what_is_cached(self) -> None:
        for event in self.pool.take_events():
            if isinstance(event, BlockStored):
                assert event.parent_block_hash is None or self.announced[event.parent_block_hash] > 0
                self.announced.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.announced.subtract(event.block_hashes)
            else:
                self.announced.clear()
        assert +self.announced == Counter(external_hash(block_hash) for block_hash in self.hash_of.values())


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
