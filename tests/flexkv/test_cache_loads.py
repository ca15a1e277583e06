"""Loads from the SSD tier, as the control plane sees them: shared, in part, damaged, lost."""

import numpy as np
import pytest

from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.loads import CacheLoad
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig
from flexkv.common.transfer import TransferType
from flexkv.errors import CacheStateError
from kvblocks.hashing import BlockHasher

HASHER = BlockHasher(block_size=1)


def sequence(num_blocks: int, start: int = 0) -> SequenceMeta:
    return SequenceMeta.from_tokens(np.arange(start, start + num_blocks), 1, HASHER)


def make_with(*stored: SequenceMeta) -> GlobalCacheEngine:
    """Four blocks of memory, sixteen on disk, where all of these are; the last ones are in memory, too."""
    config = CacheConfig(CpuTierConfig(num_blocks=4), 1, EvictionConfig(evict_ratio=0.0))
    engine = GlobalCacheEngine(config, 4, 32, 16)
    for meta in stored:
        plan = engine.plan_put(meta)
        assert plan.graph is not None
        for op_id in plan.graph.ops:
            engine.op_finished(plan, op_id, ok=True)
        engine.release(plan)
    return engine


def begin(engine: GlobalCacheEngine, meta: SequenceMeta) -> tuple[CacheLoad, int]:
    """Match, think again, and return the load that goes on, with how many blocks the match promised."""
    plan = engine.plan_get(meta)
    engine.release(plan)
    (load,) = engine.take_loads()
    return load, plan.num_blocks


def test_a_get_waits_for_the_load_of_another():
    wanted = sequence(4)
    engine = make_with(wanted, sequence(4, start=100))
    first, second = engine.plan_get(wanted), engine.plan_get(wanted)
    (load,) = engine.take_loads()
    for plan in (first, second):
        assert plan.graph is not None
        assert [op.waits_for for op in plan.graph.ops.values()] == [frozenset((load.op_id,))]
    engine.load_finished(load, ok=True)
    assert not engine.is_broken(first)
    assert not engine.is_broken(second)


def test_what_is_in_memory_does_not_wait():
    short, long = sequence(2), sequence(4)
    engine = make_with(long, sequence(4, start=100))
    load, _ = begin(engine, short)
    engine.load_finished(load, ok=True)
    plan = engine.plan_get(long)
    (load,) = engine.take_loads()
    assert plan.graph is not None
    here, coming = plan.graph.ops.values()
    assert (here.type, here.num_blocks, here.waits_for) == (TransferType.H2D, 2, frozenset())
    assert (coming.type, coming.num_blocks, coming.waits_for) == (TransferType.H2D, 2, frozenset((load.op_id,)))


def test_what_arrived_of_a_load_stays_and_who_waited_for_all_is_told():
    wanted = sequence(4)
    engine = make_with(wanted, sequence(4, start=100))
    plan = engine.plan_get(wanted)
    (load,) = engine.take_loads()
    engine.load_finished(load, ok=True, failed=[2])
    assert engine.is_broken(plan)
    engine.release(plan)
    assert engine.num_ready(wanted) == 2
    engine.check_integrity()
    assert engine.reset()


def test_damaged_blocks_leave_the_disk():
    wanted = sequence(4)
    engine = make_with(wanted, sequence(4, start=100))
    load, num_promised = begin(engine, wanted)
    assert num_promised == 4
    engine.load_finished(load, ok=True, failed=[1], bad=[1])
    plan = engine.plan_get(wanted)
    assert plan.num_blocks == 1
    assert engine.take_loads() == []


def test_memory_that_the_system_may_still_write_is_never_used_again():
    wanted = sequence(3)
    engine = make_with(wanted, sequence(4, start=100))
    load, _ = begin(engine, wanted)
    lost = set(next(iter(load.graph.ops.values())).dst_block_ids.tolist())
    engine.load_finished(load, ok=True, failed=[0, 1, 2], is_memory_lost=True)
    plan = engine.plan_put(sequence(4, start=200))
    assert plan.graph is not None
    put = next(op for op in plan.graph.ops.values() if op.type is TransferType.D2H)
    assert lost.isdisjoint(put.dst_block_ids.tolist())
    engine.check_integrity()
    engine.release(plan)
    assert not engine.reset()


def test_a_load_ends_once():
    wanted = sequence(3)
    engine = make_with(wanted, sequence(4, start=100))
    load, _ = begin(engine, wanted)
    engine.load_finished(load, ok=False)
    with pytest.raises(CacheStateError, match="ended twice"):
        engine.load_finished(load, ok=False)
