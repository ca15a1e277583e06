"""Decides, for one request, what every tier serves and stores, and which copies that takes.

The life of a plan, and of the blocks it inserts:

    plan_get / plan_put   the path is locked; new blocks are in the index, unready
    op_finished(ok)       they are ready, and announced once everything above them is ready too
    op_finished(not ok)   they and everything below leave the index; so do the blocks a failed load was reading,
                          which must not be promised again
    release               the path is unlocked; what left the index is free once nobody else locks it

A plan that is released before its ops ran leaves the index as if it had never been made.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Literal

from flexkv.cache.cache_engine import CacheEngine
from flexkv.cache.cache_events import CacheEventLog
from flexkv.cache.transfer_pattern import DeviceTransfer, get_from_cpu, put_to_cpu
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig
from flexkv.common.transfer import TransferOpGraph
from flexkv.errors import CacheStateError, InvalidRequestError
from kvblocks.events import MEDIUM_CPU, BlockRemoved, BlockStored

PlanKind = Literal["get", "put"]


@dataclass(frozen=True, slots=True, eq=False)
class CachePlan:
    """What one request will load or store: blocks `[first_block, first_block + num_blocks)` of its sequence.

    Attributes:
        graph: the copies, their device side not bound yet; None when there is nothing to copy.
        caller_op_ids: the ops whose end makes the caller's data safe: on the device (get), off the device (put).
    """

    plan_id: int
    kind: PlanKind
    graph: TransferOpGraph | None
    first_block: int
    num_blocks: int
    caller_op_ids: frozenset[int] = frozenset()


@dataclass(slots=True)
class CacheStats:
    """A snapshot: counters since the start, in blocks unless named otherwise, and the present sizes of the CPU tier."""

    num_gets: int = 0
    num_puts: int = 0
    num_queried: int = 0
    """Blocks that gets asked for beyond those the device had."""
    num_hit: int = 0
    num_stored: int = 0
    num_evicted: int = 0
    num_failed: int = 0
    """Removed because a copy into or out of them failed, or because a put was given up."""
    num_rejected: int = 0
    """Not stored for lack of room."""
    num_events_dropped: int = 0
    num_total_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_in_flight_blocks: int = 0


@dataclass(frozen=True, slots=True)
class _BlockSpan:
    """What an op reads or fills: the last `num_blocks` of the path to `handle`."""

    handle: int
    first_block: int
    num_blocks: int


@dataclass(slots=True)
class _OpenPlan:
    """What a plan holds until it is released."""

    plan: CachePlan
    sequence: SequenceMeta
    lock: int
    spans: dict[int, _BlockSpan]
    """By id, the ops that have not ended."""
    unannounced: list[_BlockSpan] = field(default_factory=list)
    """Ready, but below blocks that are not; locked until they are announced or gone."""
    is_released: bool = False


class GlobalCacheEngine:
    """The control plane over all tiers. Not thread-safe; never blocks, does no I/O."""

    def __init__(self, cache_config: CacheConfig, num_cpu_blocks: int, hash_digest_size: int = 32) -> None:
        """Make an empty index over `num_cpu_blocks` blocks of host memory.

        Raises:
            ConfigError: the digest size or the eviction policy is not supported.
        """
        self._tokens_per_block = cache_config.tokens_per_block
        self._digest_size = hash_digest_size
        self._cpu = CacheEngine(num_cpu_blocks, hash_digest_size, cache_config.eviction)
        self._plan_ids = itertools.count(1)
        self._open: dict[int, _OpenPlan] = {}
        self._unannounced: dict[int, _OpenPlan] = {}
        self._events = CacheEventLog(MEDIUM_CPU)
        self._stats = CacheStats()

    def plan_get(self, sequence: SequenceMeta, first_block: int = 0) -> CachePlan:
        """Plan to load the longest prefix that can be served, from `first_block` on, and lock it.

        Raises:
            InvalidRequestError: the sequence was hashed for another cache, or `first_block` lies outside it.
        """
        self._check(sequence, first_block)
        lock, num_ready = self._cpu.lock_prefix(sequence.block_hashes, ready_only=True)
        num_hit = max(0, num_ready - first_block)
        self._stats.num_gets += 1
        self._stats.num_queried += sequence.num_blocks - first_block
        self._stats.num_hit += num_hit
        if num_hit == 0:
            self._cpu.unlock(lock)
            return self._empty_plan("get", first_block)
        transfer = get_from_cpu(self._cpu.block_ids(lock, first_block, num_hit))
        return self._open_plan("get", sequence, transfer, _BlockSpan(lock, first_block, num_hit))

    def plan_put(self, sequence: SequenceMeta, first_block: int = 0) -> CachePlan:
        """Plan to store what the CPU tier lacks of a sequence whose blocks from `first_block` on the caller has.

        The plan starts at the first missing block, and covers what there is room for. It is empty when that block comes
        before `first_block`: a prefix has no holes. What another plan is storing already is not missing.

        Raises:
            InvalidRequestError: the sequence was hashed for another cache, or `first_block` lies outside it.
        """
        self._check(sequence, first_block)
        lock, num_present = self._cpu.lock_prefix(sequence.block_hashes, ready_only=False)
        num_missing = sequence.num_blocks - num_present
        self._stats.num_puts += 1
        inserted = None
        if num_missing > 0 and num_present >= first_block:
            inserted = self._cpu.insert(lock, sequence.block_hashes[num_present:])
            self._stats.num_rejected += num_missing - (len(inserted.block_ids) if inserted else 0)
        if inserted is None:
            self._cpu.unlock(lock)
            return self._empty_plan("put", first_block)
        self._stats.num_evicted += len(inserted.evicted)
        self._events.removed(inserted.evicted)
        span = _BlockSpan(inserted.handle, num_present, len(inserted.block_ids))
        return self._open_plan("put", sequence, put_to_cpu(inserted.block_ids), span)

    def op_finished(self, plan: CachePlan, op_id: int, ok: bool) -> None:
        """Note that an op ended. Ok: what it filled becomes ready. Else: what it filled or read leaves the index.

        An op that never began did not fail: release its plan instead.

        Raises:
            CacheStateError: the plan is released, or has no such op that has not ended.
        """
        held = self._open.get(plan.plan_id)
        if held is None or held.is_released:
            raise CacheStateError(f"op {op_id} ended after plan {plan.plan_id} was released")
        span = held.spans.pop(op_id, None)
        if span is None:
            raise CacheStateError(f"plan {plan.plan_id} has no op {op_id} that has not ended")
        if not ok:
            self._remove(span)
        elif plan.kind == "put":
            self._cpu.set_ready(span.handle, span.num_blocks)
            held.unannounced.append(span)
            self._unannounced[plan.plan_id] = held
        self._announce()

    def release(self, plan: CachePlan) -> None:
        """Give up what a plan holds, once all its ops ended or instead of running them; later calls do nothing."""
        held = self._open.get(plan.plan_id)
        if held is None or held.is_released:
            return
        held.is_released = True
        if plan.kind == "put":
            for span in held.spans.values():
                self._remove(span)
        self._unlock_if_done(held)
        self._announce()

    def take_events(self) -> list[BlockStored | BlockRemoved]:
        """Return what the tiers stored and removed since the last call, in order."""
        return self._events.take()

    def reset(self) -> bool:
        """Forget every block. Returns False, changing nothing, while any plan is open."""
        if self._open:
            return False
        evicted = self._cpu.evict(self._cpu.num_blocks)
        self._stats.num_evicted += len(evicted)
        self._events.removed(evicted)
        return True

    @property
    def num_cached_blocks(self) -> int:
        """Number of blocks of the CPU tier that are in the index and ready."""
        return self._cpu.counts().num_ready_blocks

    def stats(self) -> CacheStats:
        """Return the counters and sizes at this moment."""
        num_free, num_cached = self._cpu.num_free, self.num_cached_blocks
        return replace(
            self._stats,
            num_events_dropped=self._events.num_dropped,
            num_total_blocks=self._cpu.num_blocks,
            num_free_blocks=num_free,
            num_cached_blocks=num_cached,
            num_in_flight_blocks=self._cpu.num_blocks - num_free - num_cached,
        )

    def memory_bytes(self) -> int:
        """Memory that the indexes take, in bytes."""
        return self._cpu.memory_bytes()

    def check_integrity(self) -> None:
        """Check every invariant of the tiers, and that plans hold all the locks there are. Visits every block.

        Raises:
            CacheStateError: one is broken; the message names it.
        """
        self._cpu.check_integrity()
        num_locks = self._cpu.counts().num_locks
        if num_locks != len(self._open):
            raise CacheStateError(f"{len(self._open)} open plans hold {num_locks} locks")
        in_flight = self.stats().num_in_flight_blocks
        if not self._open and in_flight:
            raise CacheStateError(f"{in_flight} blocks are in flight though no plan is open")

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

    def _empty_plan(self, kind: PlanKind, first_block: int) -> CachePlan:
        return CachePlan(next(self._plan_ids), kind, None, first_block, 0)

    def _open_plan(
        self, kind: PlanKind, sequence: SequenceMeta, transfer: DeviceTransfer, span: _BlockSpan
    ) -> CachePlan:
        op_id = transfer.device_op.op_id
        plan = CachePlan(
            next(self._plan_ids), kind, transfer.graph, span.first_block, span.num_blocks, frozenset((op_id,))
        )
        self._open[plan.plan_id] = _OpenPlan(plan, sequence, span.handle, {op_id: span})
        return plan

    def _remove(self, span: _BlockSpan) -> None:
        # Blocks of other plans may have come below; theirs leave too, since nothing reaches them any more.
        self._events.removed(self._cpu.remove(span.handle, span.num_blocks))
        self._stats.num_failed += span.num_blocks

    def _announce(self) -> None:
        """Announce the ready blocks that everything above is ready for, parents first; drop those that are gone."""
        waiting = [(span, held) for held in self._unannounced.values() for span in held.unannounced]
        for span, held in sorted(waiting, key=lambda item: item[0].first_block):
            if not self._settle(held.sequence, span):
                continue
            held.unannounced.remove(span)
            if not held.unannounced:
                del self._unannounced[held.plan.plan_id]
                self._unlock_if_done(held)

    def _settle(self, sequence: SequenceMeta, span: _BlockSpan) -> bool:
        """Announce blocks that can be served, or drop those that left the index; False while neither holds."""
        if not self._cpu.is_attached(span.handle):
            self._stats.num_failed += span.num_blocks
            return True
        if not self._cpu.is_servable(span.handle):
            return False
        self._events.stored(sequence, span.first_block, span.num_blocks)
        self._stats.num_stored += span.num_blocks
        return True

    def _unlock_if_done(self, held: _OpenPlan) -> None:
        if held.is_released and not held.unannounced:
            del self._open[held.plan.plan_id]
            self._cpu.unlock(held.lock)
