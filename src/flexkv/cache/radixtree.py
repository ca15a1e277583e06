"""Which sequences of blocks one tier holds: the face of the native radix tree.

    root (no blocks)
    +-- [h0 h1 h2 | 7 8 9]       a node is a run of digests and of physical block ids
    |   +-- [h3 | 12]
    +-- [g0 g1 | 3 4]

A node is inserted unready and served only once it and everything above it is ready. A lock is held on the whole path
from a node to the root; locked, unready and inner nodes are never evicted. A handle names the bottom of a locked path
and stays good through splits. Every digest is compared in full.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexkv import _native
from flexkv.common.transfer import BlockIds
from flexkv.errors import ConfigError

Digests = npt.NDArray[np.uint8]
"""Consecutive blocks of one sequence: uint8 `[num_blocks, digest_size]`, contiguous."""


class MatchLength(NamedTuple):
    """How many blocks of a sequence, from its start, are in the index, and how many of them can be served."""

    num_present: int
    num_ready: int


class LockedPrefix(NamedTuple):
    """A locked path: its bottom node, and how many blocks of the sequence it covers."""

    handle: int
    num_blocks: int


class Removal(NamedTuple):
    """What left the index: blocks that nobody holds any more, and digests that could be served before."""

    block_ids: BlockIds
    digests: Digests


class TreeCounts(NamedTuple):
    """Sizes of a tree; detached blocks left the index but are locked still."""

    num_blocks: int
    num_ready_blocks: int
    num_detached_blocks: int
    num_nodes: int
    num_locks: int


class RadixTree:
    """The index of one tier. Not thread-safe.

    Every method raises CacheStateError, changing nothing, on a handle whose node is gone.
    """

    def __init__(self, digest_size: int, policy: str = "lru") -> None:
        """Make an empty index.

        Raises:
            ConfigError: a digest size that is not a multiple of 4 of at least 8, or an unknown eviction policy.
        """
        try:
            self._native = _native.RadixTree(digest_size, policy)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def match(self, sequence: Digests) -> MatchLength:
        """Measure the stored prefix of a sequence, which counts as no use of it."""
        return MatchLength(*self._native.match(sequence))

    def lock_prefix(self, sequence: Digests, *, ready_only: bool) -> LockedPrefix:
        """Lock the longest stored prefix, or the longest that can be served, and count a use of exactly its blocks."""
        return LockedPrefix(*self._native.lock_prefix(sequence, ready_only))

    def path_block_ids(self, handle: int, first: int, count: int) -> BlockIds:
        """Return physical blocks `[first, first + count)` of the path that ends at `handle`.

        Raises:
            CacheStateError: the path is shorter.
        """
        return self._native.path_block_ids(handle, first, count)

    def insert(self, handle: int, digests: Digests, block_ids: BlockIds) -> int:
        """Add an unready node below `handle`, whose lock moves to the new node; returns the new handle.

        Raises:
            CacheStateError: `handle` is not locked, not in the index, or has a child that starts with this digest.
        """
        return self._native.insert(handle, digests, block_ids)

    def set_ready(self, handle: int, num_blocks: int) -> bool:
        """Mark the last `num_blocks` blocks of the path ready; returns whether they can be served now.

        Raises:
            CacheStateError: these blocks are not whole nodes.
        """
        return self._native.set_ready(handle, num_blocks)

    def is_attached(self, handle: int) -> bool:
        """Whether the node is in the index."""
        return self._native.is_attached(handle)

    def is_servable(self, handle: int) -> bool:
        """Whether the node is in the index, and it and everything above it is ready."""
        return self._native.is_servable(handle)

    def remove(self, handle: int, num_blocks: int) -> Removal:
        """Take the last `num_blocks` blocks of the path and everything below them out of the index.

        Locked nodes of these give their blocks back with their last unlock. No change when they were removed before.

        Raises:
            CacheStateError: the path is shorter, or `num_blocks` is 0.
        """
        return Removal(*self._native.remove(handle, num_blocks))

    def unlock(self, handle: int) -> BlockIds:
        """Give one lock back; returns the blocks of removed nodes that nobody locks any more.

        Raises:
            CacheStateError: the node is not locked, or an unready one would be left without any lock.
        """
        return self._native.unlock(handle)

    def evict(self, num_blocks: int) -> Removal:
        """Take up to `num_blocks` blocks from the ends of evictable leaves, in the order of the policy."""
        return Removal(*self._native.evict(num_blocks))

    def counts(self) -> TreeCounts:
        """Return the sizes of the tree."""
        return TreeCounts(*self._native.counts())

    def memory_bytes(self) -> int:
        """Memory the index takes, in bytes."""
        return self._native.memory_bytes()

    def all_block_ids(self) -> BlockIds:
        """Return every physical block it holds, removed but locked ones included, in no order."""
        return self._native.all_block_ids()

    def check_integrity(self) -> None:
        """Visit every node and check the invariants of the tree.

        Raises:
            CacheStateError: one is broken; the message names it.
        """
        self._native.check_integrity()
