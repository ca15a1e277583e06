from __future__ import annotations

import numpy as np
import pytest

from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.plans import CachePlan
from flexkv.common.block import Namespace, SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig
from flexkv.common.transfer import TransferType
from flexkv.errors import CacheStateError, InvalidRequestError
from kvblocks.events import BlockRemoved, BlockStored
from kvblocks.hashing import BlockHasher, external_hashes

BLOCK = 2
HASHER = BlockHasher(block_size=BLOCK)


def make(num_blocks: int) -> GlobalCacheEngine:
    config = CacheConfig(
        cpu=CpuTierConfig(num_blocks=num_blocks), tokens_per_block=BLOCK, eviction=EvictionConfig(evict_ratio=0.0)
    )
    return GlobalCacheEngine(config, num_blocks)


def sequence(num_blocks: int, start: int = 0, namespace: Namespace = None) -> SequenceMeta:
    tokens = np.arange(start, start + num_blocks * BLOCK)
    return SequenceMeta.from_tokens(tokens, BLOCK, HASHER, namespace)


def end(engine: GlobalCacheEngine, plan: CachePlan, ok: bool = True) -> None:
    for op_id in plan.caller_op_ids:
        engine.op_finished(plan, op_id, ok)
    engine.release(plan)
    engine.check_integrity()


def put(engine: GlobalCacheEngine, meta: SequenceMeta) -> CachePlan:
    plan = engine.plan_put(meta)
    end(engine, plan)
    return plan


def num_loadable(engine: GlobalCacheEngine, meta: SequenceMeta, first_block: int = 0) -> int:
    plan = engine.plan_get(meta, first_block)
    engine.release(plan)
    return plan.num_blocks


def cpu_blocks(plan: CachePlan) -> list[int]:
    assert plan.graph is not None
    (op,) = plan.graph.ops.values()
    ids = op.src_block_ids if op.type is TransferType.H2D else op.dst_block_ids
    return ids.tolist()


def test_what_was_put_can_be_got_from_the_same_blocks() -> None:
    engine = make(16)
    stored = put(engine, sequence(5))
    assert (stored.kind, stored.first_block, stored.num_blocks) == ("put", 0, 5)
    plan = engine.plan_get(sequence(7), first_block=2)
    assert (plan.kind, plan.first_block, plan.num_blocks) == ("get", 2, 3)
    assert cpu_blocks(plan) == cpu_blocks(stored)[2:]
    assert plan.graph is not None
    assert plan.caller_op_ids == set(plan.graph.ops)
    plan.graph.bind_device_blocks(np.array([4, 5, 6]))
    end(engine, plan)


def test_a_get_serves_nothing_that_is_not_there_yet() -> None:
    engine = make(16)
    plan = engine.plan_put(sequence(4))
    miss = engine.plan_get(sequence(4))
    assert (miss.graph, miss.num_blocks, miss.caller_op_ids) == (None, 0, frozenset())
    engine.release(miss)
    end(engine, plan)
    assert num_loadable(engine, sequence(4)) == 4


def test_a_put_stores_only_what_is_neither_there_nor_under_way() -> None:
    engine = make(16)
    first = engine.plan_put(sequence(4))
    second = engine.plan_put(sequence(6))
    assert (second.first_block, second.num_blocks) == (4, 2)
    assert set(cpu_blocks(first)).isdisjoint(cpu_blocks(second))
    third = engine.plan_put(sequence(6))
    assert third.graph is None
    end(engine, second)
    assert num_loadable(engine, sequence(6)) == 0
    end(engine, first)
    assert num_loadable(engine, sequence(6)) == 6


def test_a_put_whose_first_missing_block_the_caller_lacks_stores_nothing() -> None:
    engine = make(16)
    put(engine, sequence(2))
    assert engine.plan_put(sequence(6), first_block=3).graph is None
    plan = engine.plan_put(sequence(6), first_block=1)
    assert (plan.first_block, plan.num_blocks) == (2, 4)


def test_room_for_eight_of_twenty_blocks_stores_eight() -> None:
    engine = make(8)
    assert put(engine, sequence(20)).num_blocks == 8
    assert num_loadable(engine, sequence(20)) == 8
    assert engine.stats().num_rejected == 12


def test_a_put_without_any_room_is_empty() -> None:
    engine = make(2)
    held = engine.plan_put(sequence(2))
    plan = engine.plan_put(sequence(2, start=100))
    assert plan.graph is None
    engine.release(plan)
    end(engine, held)


def test_a_failed_put_takes_what_was_stored_below_with_it() -> None:
    engine = make(16)
    first, middle, last = (engine.plan_put(sequence(count)) for count in (2, 4, 6))
    end(engine, first)
    end(engine, last)
    assert engine.stats().num_cached_blocks == 4
    (op_id,) = middle.caller_op_ids
    engine.op_finished(middle, op_id, ok=False)
    engine.check_integrity()
    assert num_loadable(engine, sequence(6)) == 2
    # The failed copy may still be writing until its plan is released: its blocks are not free before.
    assert engine.stats().num_free_blocks == 12
    engine.release(middle)
    assert engine.stats().num_free_blocks == 14
    assert engine.stats().num_failed == 4
    assert [type(event) for event in engine.take_events()] == [BlockStored]


def test_blocks_of_a_copy_under_way_are_not_reused_when_the_blocks_above_fail() -> None:
    engine = make(6)
    above, below = engine.plan_put(sequence(2)), engine.plan_put(sequence(4))
    end(engine, above, ok=False)
    other = engine.plan_put(sequence(6, start=100))
    assert other.num_blocks == 2
    assert set(cpu_blocks(other)).isdisjoint(cpu_blocks(below))
    end(engine, below)
    end(engine, other)
    assert engine.stats().num_free_blocks == 4


def test_a_put_given_up_before_it_ran_leaves_no_trace() -> None:
    engine = make(8)
    put(engine, sequence(2))
    engine.take_events()
    plan = engine.plan_put(sequence(6))
    engine.release(plan)
    engine.release(plan)
    engine.check_integrity()
    assert num_loadable(engine, sequence(6)) == 2
    assert engine.stats().num_free_blocks == 6
    assert engine.take_events() == []


def test_blocks_that_failed_to_load_are_not_promised_again() -> None:
    engine = make(8)
    put(engine, sequence(6))
    reader = engine.plan_get(sequence(6))
    engine.take_events()
    end(engine, engine.plan_get(sequence(5), first_block=3), ok=False)
    assert num_loadable(engine, sequence(6)) == 3
    (event,) = engine.take_events()
    assert isinstance(event, BlockRemoved)
    assert event.block_hashes == external_hashes(sequence(6).block_hashes[3:]).tolist()
    assert engine.stats().num_free_blocks == 2
    end(engine, reader)
    assert engine.stats().num_free_blocks == 5


def test_a_get_given_up_before_it_ran_drops_nothing() -> None:
    engine = make(8)
    put(engine, sequence(6))
    engine.release(engine.plan_get(sequence(6)))
    assert num_loadable(engine, sequence(6)) == 6


def test_blocks_being_loaded_are_not_evicted() -> None:
    engine = make(4)
    put(engine, sequence(4))
    plan = engine.plan_get(sequence(2))
    assert put(engine, sequence(4, start=100)).num_blocks == 2
    assert num_loadable(engine, sequence(4)) == 2
    end(engine, plan)


def test_namespaces_share_no_block() -> None:
    engine = make(16)
    put(engine, sequence(3, namespace="a"))
    for other in (None, "b", ("a", "a")):
        assert num_loadable(engine, sequence(3, namespace=other)) == 0
    assert num_loadable(engine, sequence(3, namespace=("a",))) == 3


def test_a_prompt_shorter_than_a_block_is_a_miss() -> None:
    engine = make(4)
    short = SequenceMeta.from_tokens([1], BLOCK, HASHER)
    assert engine.plan_put(short).graph is None
    assert engine.plan_get(short).graph is None
    engine.check_integrity()


def test_events_name_blocks_as_the_wire_does() -> None:
    engine = make(4)
    put(engine, sequence(2))
    put(engine, sequence(3))
    put(engine, sequence(2, start=50, namespace=("tenant", "salt")))
    hashes = external_hashes(sequence(3).block_hashes).tolist()
    tenant = external_hashes(sequence(2, start=50, namespace=("tenant", "salt")).block_hashes).tolist()
    assert engine.take_events() == [
        BlockStored(hashes[:2], None, [0, 1, 2, 3], BLOCK, medium="CPU"),
        BlockStored(hashes[2:], hashes[1], [4, 5], BLOCK, medium="CPU"),
        BlockRemoved(hashes[2:], medium="CPU"),
        BlockStored(tenant, None, [50, 51, 52, 53], BLOCK, medium="CPU", extra_keys=[("tenant", "salt"), None]),
    ]
    assert engine.take_events() == []


def test_children_are_announced_after_their_parents() -> None:
    engine = make(8)
    first, second, third = (engine.plan_put(sequence(count)) for count in (1, 2, 3))
    for plan in (third, second):
        end(engine, plan)
        assert engine.take_events() == []
    assert not engine.reset()
    end(engine, first)
    stored = engine.take_events()
    hashes = external_hashes(sequence(3).block_hashes).tolist()
    assert [event.block_hashes for event in stored] == [[value] for value in hashes]
    assert engine.reset()


def test_events_nobody_takes_are_bounded() -> None:
    engine = make(4)
    engine._cpu.events._events = type(engine._cpu.events._events)(maxlen=3)
    for start in range(0, 1000, 100):
        put(engine, sequence(4, start=start))
    assert len(engine.take_events()) == 3
    assert engine.stats().num_events_dropped > 0


def test_reset_forgets_everything_or_nothing() -> None:
    engine = make(8)
    put(engine, sequence(4))
    put(engine, sequence(2, start=100))
    plan = engine.plan_get(sequence(4))
    assert not engine.reset()
    assert num_loadable(engine, sequence(4)) == 4
    end(engine, plan)
    engine.take_events()
    assert engine.reset()
    engine.check_integrity()
    assert engine.stats().num_free_blocks == 8
    assert sum(len(event.block_hashes) for event in engine.take_events()) == 6
    assert num_loadable(engine, sequence(4)) == 0


def test_statistics_count_blocks() -> None:
    engine = make(8)
    put(engine, sequence(4))
    engine.release(engine.plan_get(sequence(6), first_block=1))
    put(engine, sequence(6, start=100))
    stats = engine.stats()
    assert (stats.num_gets, stats.num_puts, stats.num_queried, stats.num_hit) == (1, 2, 5, 3)
    assert (stats.num_stored, stats.num_evicted, stats.num_failed, stats.num_rejected) == (10, 2, 0, 0)
    assert (stats.num_total_blocks, stats.num_free_blocks) == (8, 0)
    assert (stats.num_cached_blocks, stats.num_in_flight_blocks) == (8, 0)
    assert engine.num_cached_blocks == 8


def test_misuse_is_refused() -> None:
    engine = make(8)
    plan = engine.plan_put(sequence(2))
    (op_id,) = plan.caller_op_ids
    with pytest.raises(CacheStateError, match="no op 0"):
        engine.op_finished(plan, 0, ok=True)
    engine.op_finished(plan, op_id, ok=True)
    with pytest.raises(CacheStateError, match=f"no op {op_id}"):
        engine.op_finished(plan, op_id, ok=True)
    engine.release(plan)
    with pytest.raises(CacheStateError, match="released"):
        engine.op_finished(plan, op_id, ok=True)
    for first_block in (-1, 3):
        with pytest.raises(InvalidRequestError, match="first_block"):
            engine.plan_get(sequence(2), first_block)
    with pytest.raises(InvalidRequestError, match="blocks of 2 tokens"):
        engine.plan_put(SequenceMeta.from_tokens([1, 2, 3], 3, BlockHasher(block_size=3)))
