"""One tier as plans use it: locked paths, blocks on their way in, and when they are announced.

    hold       the stored prefix of a sequence is locked
    extend     blocks below it are in the index, unready
    filled     they are ready, and announced once everything above them is ready too; those that did not arrive leave
    drop       blocks whose bytes are bad leave, and everything below them
    release    the path is unlocked, once what was filled is announced or gone; what was never filled leaves

A hold that is released before it was filled leaves the index as if it had never been made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flexkv.cache.cache_engine import CacheEngine
from flexkv.cache.cache_events import CacheEventLog
from flexkv.cache.radixtree import MatchLength
from flexkv.common.block import SequenceMeta
from flexkv.common.config import EvictionConfig
from flexkv.common.transfer import BlockIds
from flexkv.errors import CacheStateError
from kvblocks.events import BlockRemoved, BlockStored


@dataclass(frozen=True, slots=True, eq=False)
class BlockSpan:
    """Blocks `[first_block, first_block + num_blocks)` of a sequence: the last ones of the path to `handle`."""

    handle: int
    first_block: int
    num_blocks: int


@dataclass(slots=True, eq=False)
class Hold:
    """A locked path of a tier; only the tier changes it.

    Attributes:
        num_blocks: blocks of the sequence, from its start, that it covers.
    """

    sequence: SequenceMeta
    handle: int
    num_blocks: int
    filling: list[BlockSpan] = field(default_factory=list)
    """In the index, and neither ready nor removed."""
    unannounced: list[BlockSpan] = field(default_factory=list)
    """Ready, but below blocks that are not; locked until they are announced or gone."""
    is_released: bool = False


@dataclass(slots=True)
class TierStats:
    """Counters of a tier since the start, in blocks."""

    num_stored: int = 0
    num_evicted: int = 0
    num_failed: int = 0
    """Removed because a copy into or out of them failed, or was given up."""
    num_rejected: int = 0
    """Not stored for lack of room."""


class Tier:
    """The control plane of one tier. Not thread-safe; never blocks."""

    def __init__(self, num_blocks: int, digest_size: int, eviction: EvictionConfig, medium: str) -> None:
        """Make an empty tier, which events call `medium`.

        Raises:
            ConfigError: the digest size or the eviction policy is not supported.
        """
        self.engine = CacheEngine(num_blocks, digest_size, eviction)
        self.events = CacheEventLog(medium)
        self.stats = TierStats()
        self._holds: dict[int, Hold] = {}  # by identity, those that lock a path
        self._waiting: dict[int, Hold] = {}  # those of them with something to announce

    def match(self, sequence: SequenceMeta) -> MatchLength:
        """Measure the stored prefix, which counts as no use of it."""
        return self.engine.match(sequence.block_hashes)

    def hold(self, sequence: SequenceMeta, num_blocks: int | None = None, *, ready_only: bool) -> Hold:
        """Lock the longest stored prefix, or the longest that can be served, of at most `num_blocks`: a use of it."""
        digests = sequence.block_hashes if num_blocks is None else sequence.block_hashes[:num_blocks]
        handle, num_held = self.engine.lock_prefix(digests, ready_only=ready_only)
        hold = Hold(sequence, handle, num_held)
        self._holds[id(hold)] = hold
        return hold

    def block_ids(self, hold: Hold, first_block: int, num_blocks: int) -> BlockIds:
        """Return where these blocks of a held path lie."""
        return self.engine.block_ids(hold.handle, first_block, num_blocks)

    def extend(self, hold: Hold, num_blocks: int) -> BlockSpan | None:
        """Take as many of the next `num_blocks` blocks into the index as there is room for; None for none at all."""
        wanted = hold.sequence.block_hashes[hold.num_blocks : hold.num_blocks + num_blocks]
        inserted = self.engine.insert(hold.handle, wanted)
        num_inserted = len(inserted.block_ids) if inserted else 0
        self.stats.num_rejected += len(wanted) - num_inserted
        if inserted is None:
            return None
        self.stats.num_evicted += len(inserted.evicted)
        self.events.removed(inserted.evicted)
        span = BlockSpan(inserted.handle, hold.num_blocks, num_inserted)
        hold.handle = inserted.handle
        hold.num_blocks += num_inserted
        hold.filling.append(span)
        return span

    def filled(self, hold: Hold, span: BlockSpan, num_arrived: int) -> None:
        """Note that the first `num_arrived` blocks of a span have their bytes, and the others will never have."""
        hold.filling.remove(span)
        if num_arrived < span.num_blocks:
            self._remove(span.handle, span.num_blocks - num_arrived)
        arrived = self._ready_prefix(hold, span, num_arrived)
        if arrived is not None:
            hold.unannounced.append(arrived)
            self._waiting[id(hold)] = hold
        self.announce()

    def drop(self, hold: Hold, first_block: int) -> None:
        """Take the blocks of a held path from `first_block` on, and all below them, out of the index."""
        if first_block < hold.num_blocks:
            self._remove(hold.handle, hold.num_blocks - first_block)
            self.announce()

    def release(self, hold: Hold) -> None:
        """Give a path back; later calls do nothing."""
        if hold.is_released:
            return
        hold.is_released = True
        for span in hold.filling:
            self._remove(span.handle, span.num_blocks)
        hold.filling.clear()
        self._unlock_if_done(hold)
        self.announce()

    def clear(self) -> None:
        """Forget every block. REQUIRES: nothing is held."""
        evicted = self.engine.evict(self.engine.num_blocks)
        self.stats.num_evicted += len(evicted)
        self.events.removed(evicted)

    def take_events(self) -> list[BlockStored | BlockRemoved]:
        """Return what was stored and removed since the last call, in order."""
        return self.events.take()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held."""
        return not self._holds

    @property
    def num_ready_blocks(self) -> int:
        """Number of blocks in the index that are ready."""
        return self.engine.counts().num_ready_blocks

    @property
    def num_in_flight_blocks(self) -> int:
        """Number of blocks that are neither free nor ready."""
        return self.engine.num_blocks - self.engine.num_free - self.num_ready_blocks

    def check_integrity(self) -> None:
        """Check every invariant, and that holds have all the locks there are. Visits every block.

        Raises:
            CacheStateError: one is broken; the message names it.
        """
        self.engine.check_integrity()
        num_locks = self.engine.counts().num_locks
        if num_locks != len(self._holds):
            raise CacheStateError(f"{len(self._holds)} holds have {num_locks} locks")
        if self.is_idle and self.num_in_flight_blocks:
            raise CacheStateError(f"{self.num_in_flight_blocks} blocks are in flight though nothing is held")

    def announce(self) -> None:
        """Announce the ready blocks that everything above is ready for, parents first; drop those that are gone."""
        waiting = [(span, hold) for hold in self._waiting.values() for span in hold.unannounced]
        for span, hold in sorted(waiting, key=lambda item: item[0].first_block):
            if not self._settle(hold.sequence, span):
                continue
            hold.unannounced.remove(span)
            if not hold.unannounced:
                del self._waiting[id(hold)]
                self._unlock_if_done(hold)

    def _ready_prefix(self, hold: Hold, span: BlockSpan, num_blocks: int) -> BlockSpan | None:
        """Make the first blocks of a span ready; None when there are none, or they have left the index meanwhile."""
        if num_blocks == span.num_blocks:
            self.engine.set_ready(span.handle, num_blocks)
            return span
        if num_blocks == 0:
            return None
        end = span.first_block + num_blocks
        handle, num_held = self.engine.lock_prefix(hold.sequence.block_hashes[:end], ready_only=False)
        # Somebody may have stored the same content anew.
        is_same = num_held == end and np.array_equal(
            self.engine.block_ids(handle, span.first_block, num_blocks),
            self.block_ids(hold, span.first_block, num_blocks),
        )
        if is_same:
            self.engine.set_ready(handle, num_blocks)
        self.engine.unlock(handle)
        return BlockSpan(handle, span.first_block, num_blocks) if is_same else None

    def _remove(self, handle: int, num_blocks: int) -> None:
        # Blocks of other holds may have come below; theirs leave too, since nothing reaches them any more.
        self.events.removed(self.engine.remove(handle, num_blocks))
        self.stats.num_failed += num_blocks

    def _settle(self, sequence: SequenceMeta, span: BlockSpan) -> bool:
        """Announce blocks that can be served, or drop those that left the index; False while neither holds."""
        if not self.engine.is_attached(span.handle):
            self.stats.num_failed += span.num_blocks
            return True
        if not self.engine.is_servable(span.handle):
            return False
        self.events.stored(sequence, span.first_block, span.num_blocks)
        self.stats.num_stored += span.num_blocks
        return True

    def _unlock_if_done(self, hold: Hold) -> None:
        if hold.is_released and not hold.unannounced:
            del self._holds[id(hold)]
            self.engine.unlock(hold.handle)
