"""One tier: its index and its free blocks, kept in step.

Conservation law, checked by `check_integrity`: free + in the index + detached == all blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flexkv.cache.eviction import num_blocks_to_evict
from flexkv.cache.mempool import Mempool
from flexkv.cache.radixtree import Digests, LockedPrefix, MatchLength, RadixTree, TreeCounts
from flexkv.common.config import EvictionConfig
from flexkv.common.transfer import BlockIds
from flexkv.errors import CacheStateError


class Insertion(NamedTuple):
    """Blocks put in the index, unready: the node they end at, and where their bytes belong."""

    handle: int
    block_ids: BlockIds
    evicted: Digests
    """Blocks that had to leave for them."""


class CacheEngine:
    """The control plane of one tier. Not thread-safe; never blocks."""

    def __init__(self, num_blocks: int, digest_size: int, eviction: EvictionConfig) -> None:
        """Make an empty tier of `num_blocks` physical blocks."""
        self._eviction = eviction
        self._pool = Mempool(num_blocks)
        self._tree = RadixTree(digest_size, eviction.policy)

    def match(self, sequence: Digests) -> MatchLength:
        """Measure the stored prefix of a sequence, which counts as no use of it."""
        return self._tree.match(sequence)

    def lock_prefix(self, sequence: Digests, *, ready_only: bool) -> LockedPrefix:
        """Lock the longest stored prefix, or the longest that can be served, and count a use of it."""
        return self._tree.lock_prefix(sequence, ready_only=ready_only)

    def block_ids(self, handle: int, first: int, count: int) -> BlockIds:
        """Return physical blocks `[first, first + count)` of a locked path."""
        return self._tree.path_block_ids(handle, first, count)

    def insert(self, handle: int, digests: Digests) -> Insertion | None:
        """Insert as many of these blocks as there is room for below a locked path, evicting by policy.

        The lock moves to the returned handle. None, with the lock where it was, when there is no room at all.
        """
        needed = len(digests)
        excess = num_blocks_to_evict(self._eviction, needed, self._pool.num_free, self._pool.num_blocks)
        evicted = self.evict(excess) if excess else digests[:0]
        count = min(needed, self._pool.num_free)
        if count == 0:
            return None
        block_ids = self._pool.allocate(count)
        return Insertion(self._tree.insert(handle, digests[:count], block_ids), block_ids, evicted)

    def restore(self, sequences: Iterable[tuple[Digests, BlockIds]]) -> None:
        """Put sequences back that an earlier process has stored, with the physical blocks they lie in.

        Sequences may share their beginnings. REQUIRES: the tier is empty.

        Raises:
            CacheStateError: a block id is out of range, or given to two blocks.
        """
        is_used = np.zeros(self._pool.num_blocks, np.bool_)
        every_block = self._pool.allocate(self._pool.num_blocks)
        for digests, block_ids in sequences:
            handle, num_present = self._tree.lock_prefix(digests, ready_only=False)
            fresh = block_ids[num_present:]
            if len(fresh):
                if int(fresh.min()) < 0 or int(fresh.max()) >= len(is_used) or is_used[fresh].any():
                    raise CacheStateError(f"blocks {fresh.tolist()} cannot be restored: out of range, or taken")
                is_used[fresh] = True
                handle = self._tree.insert(handle, digests[num_present:], fresh)
                self._tree.set_ready(handle, len(fresh))
            self._tree.unlock(handle)
        self._pool.recycle(every_block[~is_used[every_block]])

    def set_ready(self, handle: int, num_blocks: int) -> bool:
        """Mark the last blocks of a path ready; returns whether they can be served now."""
        return self._tree.set_ready(handle, num_blocks)

    def is_attached(self, handle: int) -> bool:
        """Whether a locked path is in the index still."""
        return self._tree.is_attached(handle)

    def is_servable(self, handle: int) -> bool:
        """Whether a locked path is in the index and ready throughout."""
        return self._tree.is_servable(handle)

    def remove(self, handle: int, num_blocks: int) -> Digests:
        """Take the last blocks of a path and all below them out of the index; returns those that could be served."""
        removal = self._tree.remove(handle, num_blocks)
        self._pool.recycle(removal.block_ids)
        return removal.digests

    def unlock(self, handle: int) -> None:
        """Give a lock back, and with it the blocks of removed nodes that nobody else locks."""
        freed = self._tree.unlock(handle)
        if len(freed):
            self._pool.recycle(freed)

    def evict(self, num_blocks: int) -> Digests:
        """Evict up to `num_blocks` blocks; returns the digests of those that left."""
        removal = self._tree.evict(num_blocks)
        self._pool.recycle(removal.block_ids)
        return removal.digests

    @property
    def num_blocks(self) -> int:
        """Number of physical blocks of the tier."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Number of free physical blocks."""
        return self._pool.num_free

    def counts(self) -> TreeCounts:
        """Return the sizes of the index."""
        return self._tree.counts()

    def memory_bytes(self) -> int:
        """Memory that index and pool take, in bytes."""
        return self._tree.memory_bytes() + self._pool.memory_bytes()

    def check_integrity(self) -> None:
        """Check every invariant of index and pool, and the conservation law. Visits every block.

        Raises:
            CacheStateError: one is broken; the message names it.
        """
        self._tree.check_integrity()
        held = self._tree.all_block_ids()
        if self.num_free + len(held) != self.num_blocks:
            raise CacheStateError(
                f"{self.num_free} free and {len(held)} held blocks are not the {self.num_blocks} of the tier"
            )
        for block_id in np.sort(held).tolist():
            if self._pool.is_free(block_id):
                raise CacheStateError(f"block {block_id} is in the index and free at once")
