"""One suite for the workers of the tiers below host memory, each over real storage."""

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.flexkv.remote_servers import RedisServer, require_backend
from tests.flexkv.tier_workers import (
    BLOCK_BYTES,
    NUM_POOL_BLOCKS,
    NUM_SLOTS,
    Bench,
    bytes_of,
    open_bench,
    remote_config,
    ssd_config,
)

from flexkv.common.config import CacheConfig, Durability
from flexkv.common.transfer import TransferOp

KINDS = ("ssd", "ssd threads", "ssd power", "posix", "redis")


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path) -> Iterator[CacheConfig]:
    """The configuration of one tier; it opens on the same storage each time."""
    with ExitStack() as stack:
        match request.param:
            case "ssd":
                yield ssd_config(tmp_path / "a", tmp_path / "b")
            case "ssd threads":
                yield ssd_config(tmp_path / "a", backend="threads", direct=False, num_threads=2)
            case "ssd power":
                yield ssd_config(tmp_path / "a", durability=Durability.POWER, register_memory=False)
            case "posix":
                yield remote_config(f"file://{tmp_path}", namespace="team")
            case "redis":
                require_backend("redis")
                server = RedisServer()
                stack.callback(server.kill)
                yield remote_config(server.url)


@pytest.fixture
def bench(cache: CacheConfig) -> Iterator[Bench]:
    with open_bench(cache) as bench:
        yield bench


def test_blocks_come_back_where_they_are_wanted(bench):
    assert bench.store([3, 1, 7]).is_complete
    bench.blocks[:] = 0
    assert bench.load([7, 3], blocks=[11, 4]).is_complete
    assert bench.holds([7, 3], blocks=[11, 4])
    untouched = [b for b in range(NUM_POOL_BLOCKS) if b not in (11, 4)]
    assert not bench.blocks[untouched].any()


def test_what_is_not_there_fails_alone(bench):
    assert bench.store([1, 3]).is_complete
    result = bench.load([1, 2, 3, 4], blocks=[5, 6, 7, 8])
    assert result.ok
    assert not result.is_complete
    assert result.failed == (1, 3)
    assert "2 of 4 blocks" in result.error
    assert bench.holds([1, 3], blocks=[5, 7])


def test_a_restart_finds_what_was_stored(cache):
    with open_bench(cache) as bench:
        assert bench.store([2, 5], namespace=("tenant",)).is_complete
    with open_bench(cache) as bench:
        assert bench.load([2, 5], namespace=("tenant",)).is_complete
        assert bench.holds([2, 5])


def test_an_op_of_no_blocks_is_done_at_once(bench):
    assert bench.store([]).is_complete
    assert bench.load([]).is_complete


def test_many_ops_at_once_all_end_and_are_counted(bench):
    numbers = range(NUM_SLOTS)
    for number in numbers:
        bench.blocks[number] = bytes_of(number)
    stored = [bench.submit(bench.store_op([n], [n], [n])) for n in numbers]
    assert all(bench.wait(op_id).is_complete for op_id in stored)
    bench.blocks[:] = 0
    loaded = [bench.submit(bench.load_op([n], [n], [n])) for n in numbers]
    assert all(bench.wait(op_id).is_complete for op_id in loaded)
    assert bench.holds(numbers)
    for stats in bench.worker.stats().values():
        assert (stats.num_ops, stats.num_blocks, stats.num_bytes) == (NUM_SLOTS, NUM_SLOTS, NUM_SLOTS * BLOCK_BYTES)
        assert (stats.num_failed_ops, stats.num_failed_blocks, stats.num_queued) == (0, 0, 0)
        assert stats.seconds > 0


def test_an_op_that_makes_no_sense_fails_by_name(bench):
    bad = [
        (bench.load_op([1], [1], [NUM_POOL_BLOCKS]), "pool blocks 12..12 are not within 0..11"),
        (bench.load_op([1], [1], [-1]), "pool blocks -1..-1"),
        (bench.store_op([1, 2], [1, 2], [3]), "2 blocks come with the ids of 1 pool blocks"),
        (TransferOp(bench.load_op([1], [1], [1]).type, np.array([1]), np.array([1])), "says what its blocks hold"),
    ]
    for op, message in bad:
        result = bench.wait(bench.submit(op))
        assert not result.ok
        assert message in result.error
    assert bench.store([1]).is_complete, "those that follow are not hurt"


def test_closing_under_load_reports_every_op_once(cache):
    with open_bench(cache) as bench:
        assert bench.store(list(range(NUM_SLOTS))).is_complete
        op_ids = [bench.submit(bench.load_op([n % 10], [n % 10], [n % 12])) for n in range(300)]
        bench.worker.close()
        bench.worker.close()
        assert all(op_id in bench.results for op_id in op_ids)
        late = bench.submit(bench.load_op([1], [1], [1]))
        assert not bench.wait(late).ok


class CopyMachine(RuleBasedStateMachine):
    """Copies between a pool and a tier, against two dictionaries."""

    cache: CacheConfig

    @initialize()
    def open(self):
        self.stack = ExitStack()
        self.bench = self.stack.enter_context(open_bench(self.cache))
        self.pool = dict.fromkeys(range(NUM_POOL_BLOCKS), 0)
        for block in self.pool:
            self.bench.blocks[block] = bytes_of(0)
        # What an earlier example left on the same storage.
        self.tier: dict[int, int | None] = dict.fromkeys(range(NUM_SLOTS))
        if self.bench.storage.ssd is not None:
            self.bench.worker.forget(None).result(60)

    runs = st.lists(st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(0, NUM_POOL_BLOCKS - 1)), max_size=6)

    @rule(run=runs, value=st.integers(1, 50))
    def store(self, run, value):
        run = dict(run)  # each slot once, and each block
        run = [(slot, block) for block, slot in {block: slot for slot, block in run.items()}.items()]
        for slot, block in run:
            self.pool[block] = value * NUM_SLOTS + slot  # a block is in one slot at most: the index promises no more
            self.bench.blocks[block] = bytes_of(self.pool[block])
        names = [self.pool[block] for _, block in run]
        slots, blocks = [slot for slot, _ in run], [block for _, block in run]
        assert self.bench.wait(self.bench.submit(self.bench.store_op(names, slots, blocks))).is_complete
        self.tier.update(zip(slots, names, strict=True))

    @rule(run=runs)
    def load(self, run):
        run = [(slot, block) for block, slot in {block: slot for slot, block in run}.items()]  # each block once
        slots, blocks = [slot for slot, _ in run], [block for _, block in run]
        names = [slot if self.tier[slot] is None else self.tier[slot] for slot in slots]  # the former is nowhere
        result = self.bench.wait(self.bench.submit(self.bench.load_op(names, slots, blocks)))
        assert result.ok
        assert result.failed == tuple(i for i, slot in enumerate(slots) if self.tier[slot] is None)
        self.pool.update(zip(blocks, names, strict=True))
        for i in result.failed:  # anything may be there
            self.pool[blocks[i]] = 0
            self.bench.blocks[blocks[i]] = bytes_of(0)

    @rule()
    def restart(self):
        self.stack.close()
        self.bench = self.stack.enter_context(open_bench(self.cache))
        for block, name in self.pool.items():
            self.bench.blocks[block] = bytes_of(name)

    @invariant()
    def the_pool_is_right(self):
        if hasattr(self, "bench"):
            assert self.bench.holds(list(self.pool.values()), list(self.pool))

    def teardown(self):
        if hasattr(self, "stack"):
            self.stack.close()


def test_any_order_of_copies_and_restarts_is_byte_exact(cache):
    CopyMachine.cache = cache
    run_state_machine_as_test(CopyMachine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))
