"""GlobalCacheEngine against a naive model: random plans, ops ending well or badly, in any order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.plans import CachePlan
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig
from flexkv.common.transfer import TransferType
from kvblocks.events import BlockStored
from kvblocks.hashing import BlockHasher, external_hashes

HASHER = BlockHasher(block_size=1)
CAPACITY = 12
SEQUENCES = st.tuples(st.lists(st.integers(0, 1), max_size=8), st.sampled_from([None, "tenant"]))


@dataclass(eq=False)
class Entry:
    """One stay of a block in the index; a block that comes again has a new entry."""

    name: int
    parent: int


@dataclass(eq=False)
class Running:
    plan: CachePlan
    path: list[Entry]
    """The blocks it locks."""
    span: list[Entry]
    """The blocks it reads or fills."""
    blocks: dict[int, int]
    """CPU block -> name, of the same."""
    is_open: bool = True


class GlobalCacheEngineMachine(RuleBasedStateMachine):
    """Blocks are named by the external hash; `memory` is what copies have written."""

    @initialize(ratio=st.sampled_from([0.0, 0.3]))
    def make(self, ratio: float) -> None:
        config = CacheConfig(
            cpu=CpuTierConfig(num_blocks=CAPACITY), tokens_per_block=1, eviction=EvictionConfig(evict_ratio=ratio)
        )
        self.ratio = ratio
        self.engine = GlobalCacheEngine(config, CAPACITY)
        self.present: dict[int, Entry] = {}
        """Every block in the index, by name."""
        self.announced: set[int] = set()
        self.memory: dict[int, int] = {}
        self.running: list[Running] = []
        self.released: list[Running] = []
        """Puts that went well: they keep their locks until everything above them is ready too, or gone."""

    def meta(self, what: tuple[list[int], str | None]) -> tuple[SequenceMeta, list[int]]:
        meta = SequenceMeta.from_tokens(what[0], 1, HASHER, what[1])
        return meta, external_hashes(meta.block_hashes).tolist()

    def prefix(self, names: list[int], among: set[int]) -> int:
        return next((i for i, name in enumerate(names) if name not in among), len(names))

    def locked(self) -> set[int]:
        self.released = [
            run
            for run in self.released
            if self.present.get(run.span[0].name) is run.span[0] and run.span[0].name not in self.announced
        ]
        locked = itertools.chain.from_iterable(run.path for run in [*self.running, *self.released])
        return {entry.name for entry in locked if self.present.get(entry.name) is entry}

    def take_events(self) -> set[int]:
        """Follow the events as a router would; returns what was removed."""
        removed: set[int] = set()
        for event in self.engine.take_events():
            if isinstance(event, BlockStored):
                assert event.parent_block_hash is None or event.parent_block_hash in self.announced
                assert self.announced.isdisjoint(event.block_hashes)
                self.announced |= set(event.block_hashes)
            else:
                assert set(event.block_hashes) <= self.announced
                self.announced -= set(event.block_hashes)
                removed |= set(event.block_hashes)
        return removed

    def drop(self, span: list[Entry]) -> None:
        """Take blocks, as far as they are in the index still, and everything below them out of the model."""
        gone = {entry.name for entry in span if self.present.get(entry.name) is entry}
        while more := {entry.name for entry in self.present.values() if entry.parent in gone} - gone:
            gone |= more
        for name in gone:
            del self.present[name]

    @rule(what=SEQUENCES, skip=st.integers(0, 3))
    def get(self, what: tuple[list[int], str | None], skip: int) -> None:
        meta, names = self.meta(what)
        skip = min(skip, len(names))
        plan = self.engine.plan_get(meta, skip)
        num_ready = self.prefix(names, self.announced)
        assert plan.first_block == skip
        assert plan.num_blocks == max(0, num_ready - skip)
        assert (plan.graph is None) == (plan.num_blocks == 0)
        if plan.graph is not None:
            (op,) = plan.graph.ops.values()
            assert op.type is TransferType.H2D
            wanted = names[skip:num_ready]
            assert [self.memory[block] for block in op.src_block_ids.tolist()] == wanted
            blocks = dict(zip(op.src_block_ids.tolist(), wanted, strict=True))
            path = [self.present[name] for name in names[:num_ready]]
            self.running.append(Running(plan, path, path[skip:], blocks))

    @rule(what=SEQUENCES, skip=st.integers(0, 3))
    def put(self, what: tuple[list[int], str | None], skip: int) -> None:
        meta, names = self.meta(what)
        skip = min(skip, len(names))
        start = self.prefix(names, set(self.present))
        locked = self.locked() | set(names[:start])
        num_free = self.engine.stats().num_free_blocks
        num_evictable = len(self.present.keys() - locked)
        plan = self.engine.plan_put(meta, skip)
        evicted = self.take_events()
        assert evicted.isdisjoint(locked)
        for name in evicted:
            del self.present[name]
        assert all(entry.parent == 0 or entry.parent in self.present for entry in self.present.values())
        expected = min(len(names) - start, num_free + num_evictable) if start >= skip else 0
        assert plan.num_blocks == expected
        assert len(evicted) <= max(0, expected - num_free, int(self.ratio * CAPACITY))
        if plan.graph is None:
            return
        assert plan.first_block == start
        (op,) = plan.graph.ops.values()
        assert op.type is TransferType.D2H
        filled = names[start : start + expected]
        blocks = dict(zip(op.dst_block_ids.tolist(), filled, strict=True))
        for run in self.running:
            assert blocks.keys().isdisjoint(run.blocks), "a block that a copy still uses was given away"
        span = [Entry(name, names[i - 1] if i else 0) for i, name in enumerate(filled, start)]
        self.present |= {entry.name: entry for entry in span}
        for block in blocks:
            self.memory.pop(block, None)
        path = [self.present[name] for name in names[: start + expected]]
        self.running.append(Running(plan, path, span, blocks))

    @rule(what=SEQUENCES)
    def put_at_once(self, what: tuple[list[int], str | None]) -> None:
        num_running = len(self.running)
        self.put(what, skip=0)
        for run in self.running[num_running:]:
            self.end(run, ok=True)
            self.give_back(run)

    @precondition(lambda self: any(run.is_open for run in self.running))
    @rule(data=st.data(), ok=st.booleans())
    def op_ends(self, data: st.DataObject, ok: bool) -> None:
        self.end(data.draw(st.sampled_from([run for run in self.running if run.is_open])), ok)

    def end(self, run: Running, ok: bool) -> None:
        run.is_open = False
        (op_id,) = run.plan.caller_op_ids
        if run.plan.kind == "put" and ok:
            self.memory |= run.blocks
        self.engine.op_finished(run.plan, op_id, ok)
        if not ok:
            self.drop(run.span)
        self.take_events()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.give_back(data.draw(st.sampled_from(self.running)))

    def give_back(self, run: Running) -> None:
        self.running.remove(run)
        self.engine.release(run.plan)
        if run.is_open and run.plan.kind == "put":
            self.drop(run.span)
        elif run.plan.kind == "put":
            self.released.append(run)
        self.take_events()
        self.engine.release(run.plan)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.engine.check_integrity()
        assert self.announced <= self.present.keys()
        assert len(self.present) >= self.engine.num_cached_blocks >= len(self.announced)
        stats = self.engine.stats()
        assert stats.num_free_blocks + stats.num_cached_blocks + stats.num_in_flight_blocks == CAPACITY

    def teardown(self) -> None:
        for run in self.running:
            self.engine.release(run.plan)
        self.engine.check_integrity()
        assert self.engine.stats().num_in_flight_blocks == 0
        assert self.engine.reset()
        assert self.engine.stats().num_free_blocks == CAPACITY


GlobalCacheEngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestGlobalCacheEngine = GlobalCacheEngineMachine.TestCase
