"""Block tables: hits, allocation, giving back."""

import pytest
from tests.folovllm.core_fakes import make_request

from folovllm.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from folovllm.request import Request


def admit(manager: KVCacheManager, request: Request) -> int:
    """Compute a whole prompt in one step; returns the tokens hit."""
    blocks, num_hit = manager.get_computed_blocks(request)
    num_new = request.num_tokens - num_hit
    assert manager.allocate_slots(request, num_new, num_hit, blocks) is not None
    request.num_computed_tokens = request.num_tokens
    return num_hit


def test_wholly_cached_prompt_of_full_blocks_leaves_its_last_block_to_compute() -> None:
    manager = KVCacheManager(9, 4)
    assert admit(manager, make_request("a", range(8))) == 0
    assert admit(manager, make_request("b", range(8))) == 4
    assert admit(manager, make_request("c", range(9))) == 8
    manager.check_integrity({"a", "b", "c"})


def test_prefix_of_another_salt_is_not_hit() -> None:
    manager = KVCacheManager(9, 4)
    admit(manager, make_request("a", range(9), salt="one"))
    assert admit(manager, make_request("b", range(9), salt="two")) == 0
    assert admit(manager, make_request("c", range(9), salt="one")) == 8


def test_no_room_changes_nothing() -> None:
    manager = KVCacheManager(4, 4)
    first = make_request("a", range(8))
    admit(manager, first)
    manager.free(first)
    before = manager.block_pool.free_block_queue.get_all_free_blocks()
    big = make_request("b", [*range(8), *range(50, 60)])
    blocks, num_hit = manager.get_computed_blocks(big)
    assert num_hit == 8
    assert manager.allocate_slots(big, 10, num_hit, blocks) is None
    assert manager.block_pool.free_block_queue.get_all_free_blocks() == before
    assert not manager.holds_blocks("b")


def test_hit_blocks_that_are_free_are_not_counted_as_room_for_new_ones() -> None:
    manager = KVCacheManager(3, 4)
    first = make_request("a", range(4))
    admit(manager, first)
    manager.free(first)
    # Two blocks are free, one of them the hit: together with it there is room for one new block, not for two.
    request = make_request("b", range(12))
    blocks, num_hit = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, 8, num_hit, blocks) is None
    assert manager.allocate_slots(request, 4, num_hit, blocks) is not None


def test_head_of_a_freed_prefix_outlives_its_tail() -> None:
    manager = KVCacheManager(4, 4)
    first = make_request("a", range(12))
    admit(manager, first)
    manager.free(first)
    admit(manager, make_request("b", [99]))
    assert manager.get_computed_blocks(make_request("c", range(12)))[1] == 8


def test_blocks_of_a_load_are_offered_only_after_it() -> None:
    manager = KVCacheManager(9, 4)
    request, other = make_request("a", range(12)), make_request("b", range(12))
    assert manager.allocate_slots(request, 0, 0, None, 8, delay_cache_blocks=True) is not None
    assert manager.get_block_ids("a") == [1, 2]
    assert manager.get_computed_blocks(other)[1] == 0
    manager.cache_blocks(request, 8)
    assert manager.get_computed_blocks(other)[1] == 8


def test_truncate_keeps_the_head_and_lets_the_rest_be_hashed_anew() -> None:
    manager = KVCacheManager(9, 4)
    request = make_request("a", range(13))
    admit(manager, request)
    manager.evict_from(request, 1)
    manager.truncate(request, 1)
    assert len(manager.get_block_ids("a")) == 1
    assert manager.get_computed_blocks(make_request("b", range(13)))[1] == 4
    request.num_computed_tokens = 4
    assert manager.allocate_slots(request, 9) is not None
    assert manager.get_computed_blocks(make_request("b", range(13)))[1] == 12
    manager.check_integrity({"a"})


def test_without_prefix_caching_nothing_is_hit_or_announced() -> None:
    manager = KVCacheManager(9, 4, enable_caching=False, enable_kv_cache_events=True)
    admit(manager, make_request("a", range(8)))
    assert admit(manager, make_request("b", range(8))) == 0
    assert manager.take_events() == []
    assert manager.block_pool.num_cached_blocks == 0


def test_usage_and_capacity() -> None:
    manager = KVCacheManager(5, 4)
    assert manager.capacity_tokens == 16
    request = make_request("a", range(8))
    admit(manager, request)
    assert manager.usage == pytest.approx(0.5)
    assert manager.get_blocks("a").get_block_ids() == ([1, 2],)
    assert KVCacheBlocks().get_block_ids() == ([],)
    manager.free(request)
    manager.free(request)
    assert manager.usage == 0
