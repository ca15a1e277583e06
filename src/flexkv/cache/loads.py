"""Loads: copies from lower tiers into the CPU tier, with a life of their own.

    begin_from_ssd / begin_from_remote   a load is made for what the CPU tier lacks, unless another brings it already
    take                                 its graph is to be run at once
    finished                             what arrived is ready; what was found damaged leaves the SSD tier

A load begins when a get finds blocks that only a lower tier has. It serves every get that comes meanwhile, and what it
brought stays when they are cancelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexkv.cache.tier import BlockSpan, Hold, Tier
from flexkv.cache.transfer_pattern import load_from_remote, load_from_ssd
from flexkv.common.block import SequenceMeta
from flexkv.common.transfer import BlockContent, TransferOpGraph
from flexkv.errors import CacheStateError


@dataclass(frozen=True, slots=True, eq=False)
class CacheLoad:
    """A copy into the CPU tier that is to run at once: a graph of one op."""

    graph: TransferOpGraph
    op_id: int


@dataclass(slots=True, eq=False)
class _OpenLoad:
    cpu: Hold
    span: BlockSpan
    source: Hold | None = None
    """Of the SSD tier, if it comes from there."""


class CacheLoads:
    """All loads under way. Not thread-safe; never blocks."""

    def __init__(self, cpu: Tier, ssd: Tier | None) -> None:
        """Start with none."""
        self._cpu = cpu
        self._ssd = ssd
        self._open: dict[int, _OpenLoad] = {}
        self._bringing: dict[bytes, int] = {}
        """Digest of each block of the CPU tier that a load brings -> the load's op."""
        self._new: list[CacheLoad] = []

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._open)

    def begin_from_ssd(self, sequence: SequenceMeta) -> None:
        """Bring what the SSD tier has beyond the CPU tier's prefix, as far as there is room."""
        if self._ssd is None:
            return
        # A use of the blocks there even if the CPU tier has them: what is wanted shall stay in both.
        source = self._ssd.hold(sequence, ready_only=True)
        begun = self._extend(sequence, source.num_blocks)
        if begun is None:
            self._ssd.release(source)
            return
        cpu, span = begun
        slots = self._ssd.block_ids(source, span.first_block, span.num_blocks)
        graph = load_from_ssd(
            slots, self._cpu.block_ids(cpu, span.first_block, span.num_blocks), content_of(sequence, span)
        )
        self._add(graph, _OpenLoad(cpu, span, source))

    def begin_from_remote(self, sequence: SequenceMeta, num_stored: int) -> None:
        """Bring the first `num_stored` blocks, which the remote store has, as far as the CPU tier lacks them."""
        begun = self._extend(sequence, num_stored)
        if begun is not None:
            cpu, span = begun
            cpu_ids = self._cpu.block_ids(cpu, span.first_block, span.num_blocks)
            self._add(load_from_remote(cpu_ids, content_of(sequence, span)), _OpenLoad(cpu, span))

    def take(self) -> list[CacheLoad]:
        """Return the loads begun since the last call."""
        loads, self._new = self._new, []
        return loads

    def finished(
        self,
        load: CacheLoad,
        ok: bool,
        failed: Iterable[int] = (),
        bad: Iterable[int] = (),
        *,
        is_memory_lost: bool = False,
    ) -> bool:
        """Note that a load ended: blocks up to the first of `failed` have arrived, none if it is not ok.

        The SSD tier drops the blocks from the first of `bad` on. With `is_memory_lost` the system may still write into
        some of the memory: then none of it is used again. Returns whether all blocks have arrived.

        Raises:
            CacheStateError: the load has ended before.
        """
        opened = self._open.pop(load.op_id, None)
        if opened is None:
            raise CacheStateError(f"load {load.op_id} ended twice")
        span = opened.span
        for digest in opened.cpu.sequence.block_hashes[span.first_block : span.first_block + span.num_blocks]:
            del self._bringing[digest.tobytes()]
        num_arrived = min(failed, default=span.num_blocks) if ok else 0
        if self._ssd is not None and opened.source is not None:
            first_bad = min(bad, default=None)
            if first_bad is not None:
                self._ssd.drop(opened.source, span.first_block + first_bad)
            self._ssd.release(opened.source)
        self._cpu.filled(opened.cpu, span, num_arrived)
        if not is_memory_lost:
            self._cpu.release(opened.cpu)
        return num_arrived == span.num_blocks

    def num_brought(self, sequence: SequenceMeta, first_block: int, end: int) -> int:
        """Return how many blocks from `first_block` on, without a gap, loads are bringing."""
        for i in range(first_block, end):
            if sequence.block_hashes[i].tobytes() not in self._bringing:
                return i - first_block
        return end - first_block

    def ops_of(self, sequence: SequenceMeta, first_block: int, end: int) -> frozenset[int]:
        """Return the ops that bring these blocks. REQUIRES: loads are bringing all of them."""
        return frozenset(self._bringing[digest.tobytes()] for digest in sequence.block_hashes[first_block:end])

    def check_integrity(self) -> None:
        """Check that blocks are marked exactly if a load brings them.

        Raises:
            CacheStateError: they are not.
        """
        if len(self._bringing) != sum(load.span.num_blocks for load in self._open.values()):
            raise CacheStateError("blocks are marked as being brought that no load brings")

    def _extend(self, sequence: SequenceMeta, num_stored: int) -> tuple[Hold, BlockSpan] | None:
        """Make room in the CPU tier for what it lacks of these blocks; None if there is no need, or no room."""
        present, ready = self._cpu.match(sequence)
        # Blocks that a put is bringing cannot be loaded as well; soon they will be there.
        if num_stored <= present or self.num_brought(sequence, ready, present) < present - ready:
            return None
        hold = self._cpu.hold(sequence, present, ready_only=False)
        span = self._cpu.extend(hold, num_stored - present)
        if span is None:
            self._cpu.release(hold)
            return None
        return hold, span

    def _add(self, graph: TransferOpGraph, load: _OpenLoad) -> None:
        (op_id,) = graph.ops
        self._open[op_id] = load
        first = load.span.first_block
        for digest in load.cpu.sequence.block_hashes[first : first + load.span.num_blocks]:
            self._bringing[digest.tobytes()] = op_id
        self._new.append(CacheLoad(graph, op_id))


def content_of(sequence: SequenceMeta, span: BlockSpan) -> BlockContent:
    """Describe the blocks of a span."""
    return BlockContent.of_run(sequence.block_hashes, span.first_block, span.num_blocks, sequence.namespace)
