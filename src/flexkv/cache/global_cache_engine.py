"""Decides, for one request, what every tier serves and stores, and which copies that takes.

The life of a plan, and of the blocks it inserts (tier.py):

    plan_get / plan_put   paths are locked; new blocks are in the indexes, unready
    op_finished           what the op filled becomes ready, or leaves the index; so do blocks that were found bad
    release               paths are unlocked; what left an index is free once nobody else locks it

A plan that is released before its ops ran leaves the indexes as if it had never been made.

What only a lower tier has comes by loads (loads.py), which plans wait for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from flexkv.cache.loads import CacheLoad, CacheLoads, content_of
from flexkv.cache.plans import CachePlan, CacheStats, PlanKind
from flexkv.cache.tier import BlockSpan, Hold, Tier
from flexkv.cache.transfer_pattern import add_get, add_put, add_store_on_ssd, add_store_remotely
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig
from flexkv.common.transfer import TransferOp, TransferOpGraph
from flexkv.errors import CacheStateError, InvalidRequestError
from kvblocks.events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored


@dataclass(frozen=True, slots=True, eq=False)
class _Fill:
    """What an op fills: `span` of a tier, held by `hold`."""

    tier: Tier
    hold: Hold
    span: BlockSpan


@dataclass(slots=True, eq=False)
class _OpenPlan:
    """What a plan holds until it is released."""

    holds: list[tuple[Tier, Hold]]
    fills: dict[int, _Fill | None]
    """By id, the ops that have not ended; None for those that only read the CPU tier."""
    loads: set[int] = field(default_factory=set)
    """Ops of loads that bring what it reads, and have not ended."""
    first_block: int = 0
    is_broken: bool = False
    """A load that it waits for has failed."""


class GlobalCacheEngine:
    """The control plane over all tiers. Not thread-safe; never blocks, does no I/O."""

    def __init__(
        self, cache_config: CacheConfig, num_cpu_blocks: int, hash_digest_size: int = 32, num_ssd_blocks: int = 0
    ) -> None:
        """Make empty indexes over these blocks of host memory and slots of the SSD tier (0: there is none).

        What the remote store has is known to nobody here: who has asked it says so to `begin_remote_load`.

        Raises:
            ConfigError: the digest size or the eviction policy is not supported.
        """
        self._tokens_per_block = cache_config.tokens_per_block
        self._writes_remotely = cache_config.remote is not None and cache_config.remote.write == "all"
        self._digest_size = hash_digest_size
        eviction = cache_config.eviction
        self._cpu = Tier(num_cpu_blocks, hash_digest_size, eviction, MEDIUM_CPU)
        self.ssd = Tier(num_ssd_blocks, hash_digest_size, eviction, MEDIUM_STORAGE) if num_ssd_blocks else None
        self._plan_ids = itertools.count(1)
        self._open: dict[int, _OpenPlan] = {}
        self._loads = CacheLoads(self._cpu, self.ssd)
        self._stats = CacheStats()

    def plan_get(self, sequence: SequenceMeta, first_block: int = 0) -> CachePlan:
        """Plan to load the longest prefix that can be served, from `first_block` on, and lock it.

        Loads that this begins are given out by `take_loads`.

        Raises:
            InvalidRequestError: the sequence was hashed for another cache, or `first_block` lies outside it.
        """
        self._check(sequence, first_block)
        self._stats.num_gets += 1
        self._stats.num_queried += sequence.num_blocks - first_block
        self._loads.begin_from_ssd(sequence)
        hold, num_ready = self._hold_servable(sequence)
        num_hit = max(0, hold.num_blocks - first_block)
        self._stats.num_hit += num_hit
        if num_hit == 0:
            self._cpu.release(hold)
            return self._empty_plan("get", first_block)
        graph = TransferOpGraph()
        here = max(first_block, num_ready)
        ops = [add_get(graph, self._cpu.block_ids(hold, first_block, here - first_block))] if here > first_block else []
        loads: frozenset[int] = frozenset()
        if hold.num_blocks > here:
            self._stats.num_loaded += hold.num_blocks - here
            loads = self._loads.ops_of(sequence, here, hold.num_blocks)
            ops.append(add_get(graph, self._cpu.block_ids(hold, here, hold.num_blocks - here), loads))
        held = _OpenPlan([(self._cpu, hold)], {op.op_id: None for op in ops}, set(loads), first_block)
        return self._open_plan("get", graph, first_block, num_hit, ops, held)

    def plan_put(self, sequence: SequenceMeta, first_block: int = 0) -> CachePlan:
        """Plan to store what the tiers lack of a sequence whose blocks from `first_block` on the caller has.

        The plan starts at the first block that the CPU tier misses, and covers what there is room for. It covers none
        when that block comes before `first_block`: a prefix has no holes. What another plan is storing already is not
        missing. What the CPU tier has and the SSD tier lacks is copied there as well, for which the caller's blocks are
        not needed.

        Raises:
            InvalidRequestError: the sequence was hashed for another cache, or `first_block` lies outside it.
        """
        self._check(sequence, first_block)
        self._stats.num_puts += 1
        num_ready = self._cpu.match(sequence).num_ready if self.ssd is not None else 0
        hold = self._cpu.hold(sequence, ready_only=False)
        num_present = hold.num_blocks
        span = None
        if num_present < sequence.num_blocks and num_present >= first_block:
            span = self._cpu.extend(hold, sequence.num_blocks - num_present)
        graph = TransferOpGraph()
        held = _OpenPlan([(self._cpu, hold)], {}, first_block=first_block)
        put = None
        if span is not None:
            put = add_put(graph, self._cpu.block_ids(hold, span.first_block, span.num_blocks))
            held.fills[put.op_id] = _Fill(self._cpu, hold, span)
        if self.ssd is not None:
            # What others are bringing into the CPU tier is theirs to store.
            num_usable = hold.num_blocks if num_ready == num_present else num_ready
            self._add_store(graph, held, self.ssd, hold, num_usable, put)
        if span is not None and put is not None and self._writes_remotely:
            cpu_ids = self._cpu.block_ids(hold, span.first_block, span.num_blocks)
            held.fills[add_store_remotely(graph, cpu_ids, content_of(sequence, span), put).op_id] = None
        if not graph.ops:
            self._cpu.release(hold)
            return self._empty_plan("put", first_block)
        if span is None:
            return self._open_plan("put", graph, first_block, 0, [], held)
        assert put is not None
        return self._open_plan("put", graph, span.first_block, span.num_blocks, [put], held)

    def plan_prefetch(self, sequence: SequenceMeta) -> tuple[frozenset[int], int]:
        """Begin to bring what the SSD tier has of a sequence into the CPU tier.

        Returns the ops of the loads that bring parts of it, and how many blocks will be in the CPU tier then.

        Raises:
            InvalidRequestError: the sequence was hashed for another cache.
        """
        self._check(sequence, 0)
        self._loads.begin_from_ssd(sequence)
        return self._coming(sequence)

    def begin_remote_load(self, sequence: SequenceMeta, num_stored: int) -> tuple[frozenset[int], int]:
        """Begin to bring the first `num_stored` blocks, which the remote store has, as far as the CPU tier lacks them.

        Returns what `plan_prefetch` does.
        """
        self._loads.begin_from_remote(sequence, num_stored)
        return self._coming(sequence)

    def num_ready(self, sequence: SequenceMeta) -> int:
        """Return how many blocks of a sequence, from its first, the CPU tier can serve at once."""
        return self._cpu.match(sequence).num_ready

    def take_loads(self) -> list[CacheLoad]:
        """Return the loads begun since the last call; each is to be run, and its end told to `load_finished`."""
        return self._loads.take()

    def load_finished(
        self,
        load: CacheLoad,
        ok: bool,
        failed: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        is_memory_lost: bool = False,
    ) -> None:
        """Note that a load ended (see `CacheLoads.finished`). Plans that wait for what has not arrived are broken now.

        Raises:
            CacheStateError: the load has ended before.
        """
        is_whole = self._loads.finished(load, ok, failed, bad, is_memory_lost=is_memory_lost)
        for held in self._open.values():
            if load.op_id in held.loads:
                held.loads.discard(load.op_id)
                held.is_broken |= not is_whole

    def is_broken(self, plan: CachePlan) -> bool:
        """Whether a plan waits for blocks that will never come, so that it must not run."""
        held = self._open.get(plan.plan_id)
        return held is not None and held.is_broken

    def op_finished(self, plan: CachePlan, op_id: int, ok: bool, failed: Iterable[int] = ()) -> None:
        """Note that an op ended. Ok: what it filled becomes ready, up to the first of `failed`; the rest leaves.

        Not ok: all that it filled or read leaves. An op that never began did not fail: release its plan instead.

        Raises:
            CacheStateError: the plan is released, or has no such op that has not ended.
        """
        held = self._open.get(plan.plan_id)
        if held is None:
            raise CacheStateError(f"op {op_id} ended after plan {plan.plan_id} was released")
        if op_id not in held.fills:
            raise CacheStateError(f"plan {plan.plan_id} has no op {op_id} that has not ended")
        fill = held.fills.pop(op_id)
        if fill is not None:
            fill.tier.filled(fill.hold, fill.span, min(failed, default=fill.span.num_blocks) if ok else 0)
        elif not ok:
            tier, hold = held.holds[0]
            tier.drop(hold, held.first_block)

    def release(self, plan: CachePlan) -> None:
        """Give up what a plan holds, once all its ops ended or instead of running them; later calls do nothing."""
        held = self._open.pop(plan.plan_id, None)
        if held is not None:
            for tier, hold in held.holds:
                tier.release(hold)

    def take_events(self) -> list[BlockStored | BlockRemoved]:
        """Return what the tiers stored and removed since the last call, in order within each."""
        return [event for tier in self._tiers() for event in tier.take_events()]

    def reset(self) -> bool:
        """Forget every block. Returns False, changing nothing, while any plan or load is open."""
        if not all(tier.is_idle for tier in self._tiers()):
            return False
        for tier in self._tiers():
            tier.clear()
        return True

    @property
    def num_cached_blocks(self) -> int:
        """Number of blocks of the CPU tier that are in the index and ready."""
        return self._cpu.num_ready_blocks

    def stats(self) -> CacheStats:
        """Return the counters and sizes at this moment."""
        cpu, engine = self._cpu.stats, self._cpu.engine
        stats = CacheStats(
            num_gets=self._stats.num_gets,
            num_puts=self._stats.num_puts,
            num_queried=self._stats.num_queried,
            num_hit=self._stats.num_hit,
            num_loaded=self._stats.num_loaded,
            num_stored=cpu.num_stored,
            num_evicted=cpu.num_evicted,
            num_failed=cpu.num_failed,
            num_rejected=cpu.num_rejected,
            num_events_dropped=sum(tier.events.num_dropped for tier in self._tiers()),
            num_total_blocks=engine.num_blocks,
            num_free_blocks=engine.num_free,
            num_cached_blocks=self._cpu.num_ready_blocks,
            num_in_flight_blocks=self._cpu.num_in_flight_blocks,
        )
        if self.ssd is not None:
            stats.num_ssd_stored = self.ssd.stats.num_stored
            stats.num_ssd_evicted = self.ssd.stats.num_evicted
            stats.num_ssd_failed = self.ssd.stats.num_failed
            stats.num_ssd_total_blocks = self.ssd.engine.num_blocks
            stats.num_ssd_cached_blocks = self.ssd.num_ready_blocks
        return stats

    def memory_bytes(self) -> int:
        """Memory that the indexes take, in bytes."""
        return sum(tier.engine.memory_bytes() for tier in self._tiers())

    def check_integrity(self) -> None:
        """Check every invariant of the tiers, and that plans and loads hold all that is held. Visits every block.

        Raises:
            CacheStateError: one is broken; the message names it.
        """
        for tier in self._tiers():
            tier.check_integrity()
        self._loads.check_integrity()

    def _tiers(self) -> list[Tier]:
        return [self._cpu] if self.ssd is None else [self._cpu, self.ssd]

    def _check(self, sequence: SequenceMeta, first_block: int) -> None:
        digest_size = sequence.block_hashes.shape[1]
        if sequence.tokens_per_block != self._tokens_per_block or digest_size != self._digest_size:
            raise InvalidRequestError(
                f"the cache has blocks of {self._tokens_per_block} tokens and digests of {self._digest_size} bytes, "
                f"the sequence {sequence.tokens_per_block} and {digest_size}"
            )
        if not 0 <= first_block <= sequence.num_blocks:
            raise InvalidRequestError(
                f"first_block={first_block} lies outside the {sequence.num_blocks} full blocks of the sequence"
            )

    def _hold_servable(self, sequence: SequenceMeta) -> tuple[Hold, int]:
        """Lock what is ready or on its way; returns how much is ready, too."""
        if not self._loads:
            hold = self._cpu.hold(sequence, ready_only=True)
            return hold, hold.num_blocks
        present, ready = self._cpu.match(sequence)
        num_blocks = ready + self._loads.num_brought(sequence, ready, present)
        return self._cpu.hold(sequence, num_blocks, ready_only=False), ready

    def _coming(self, sequence: SequenceMeta) -> tuple[frozenset[int], int]:
        """The loads that bring parts of a sequence, and how much of it will be ready when they have ended."""
        present, ready = self._cpu.match(sequence)
        num_blocks = ready + self._loads.num_brought(sequence, ready, present)
        return self._loads.ops_of(sequence, ready, num_blocks), num_blocks

    def _add_store(
        self,
        graph: TransferOpGraph,
        held: _OpenPlan,
        ssd: Tier,
        cpu: Hold,
        num_usable: int,
        put: TransferOp | None,
    ) -> None:
        """Copy to the SSD tier what it lacks of the first `num_usable` blocks of a held path of the CPU tier."""
        hold = ssd.hold(cpu.sequence, ready_only=False)
        first = hold.num_blocks
        span = ssd.extend(hold, num_usable - first) if first < num_usable else None
        if span is None:
            ssd.release(hold)
            return
        content = content_of(cpu.sequence, span)
        cpu_ids = self._cpu.block_ids(cpu, first, span.num_blocks)
        op = add_store_on_ssd(graph, cpu_ids, ssd.block_ids(hold, first, span.num_blocks), content, put)
        held.holds.append((ssd, hold))
        held.fills[op.op_id] = _Fill(ssd, hold, span)

    def _empty_plan(self, kind: PlanKind, first_block: int) -> CachePlan:
        return CachePlan(next(self._plan_ids), kind, None, first_block, 0)

    def _open_plan(
        self,
        kind: PlanKind,
        graph: TransferOpGraph,
        first_block: int,
        num_blocks: int,
        caller_ops: list[TransferOp],
        held: _OpenPlan,
    ) -> CachePlan:
        caller_op_ids = frozenset(op.op_id for op in caller_ops)
        plan = CachePlan(next(self._plan_ids), kind, graph, first_block, num_blocks, caller_op_ids)
        self._open[plan.plan_id] = held
        return plan
