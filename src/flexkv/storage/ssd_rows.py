"""Rows of the SSD tier's index as arrays, and the order in which a restart can insert them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

HASH_BYTES: Final = 32

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlocks:
    """Blocks and where they are stored.

    Attributes:
        slots: int64 `[num_blocks]`.
        hashes: uint8 `[num_blocks, 32]`.
        parents: uint8 `[num_blocks, 32]`, the hash of the block before; all zero for the first of a sequence.
        checksums: uint64 `[num_blocks]`.
        namespace_ids: int64 `[num_blocks]`, see `SsdIndex.namespace_id`.
    """

    slots: _Ints
    hashes: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    checksums: npt.NDArray[np.uint64]
    namespace_ids: _Ints

    def __post_init__(self) -> None:
        """Check that the arrays belong together: a mistake here would be found after a restart only."""
        n = len(self.slots)
        assert self.hashes.shape == self.parents.shape == (n, HASH_BYTES)
        assert self.hashes.dtype == self.parents.dtype == np.uint8
        assert self.slots.dtype == self.namespace_ids.dtype == np.int64
        assert self.checksums.dtype == np.uint64
        assert len(self.checksums) == len(self.namespace_ids) == n

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, rows: _Ints | npt.NDArray[np.bool_]) -> StoredBlocks:
        """Return some of the rows."""
        return StoredBlocks(
            self.slots[rows], self.hashes[rows], self.parents[rows], self.checksums[rows], self.namespace_ids[rows]
        )

    @classmethod
    def concatenate(cls, parts: Sequence[StoredBlocks]) -> StoredBlocks:
        """Return the rows of all parts, in order."""
        no_hashes, no_ids = np.empty((0, HASH_BYTES), np.uint8), np.empty(0, np.int64)
        return cls(
            np.concatenate([no_ids, *(part.slots for part in parts)]),
            np.concatenate([no_hashes, *(part.hashes for part in parts)]),
            np.concatenate([no_hashes, *(part.parents for part in parts)]),
            np.concatenate([np.empty(0, np.uint64), *(part.checksums for part in parts)]),
            np.concatenate([no_ids, *(part.namespace_ids for part in parts)]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class LoadedBlocks:
    """What a restart finds.

    Attributes:
        blocks: every block that is reachable from the first of its sequence, parents before children.
        parent_rows: int64 `[num_blocks]`, the row of each block's parent in `blocks`, -1 for the first of a sequence.
        orphan_slots: int64, slots of rows that nobody can reach (their parent is missing), that name a slot out of
            range, or a block that another row has; to be deleted, then free.
    """

    blocks: StoredBlocks
    parent_rows: _Ints
    orphan_slots: _Ints

    def leaf_paths(self) -> Iterator[_Ints]:
        """Return, for each block without a child, the rows from the first block of its sequence down to it."""
        parents = self.parent_rows.tolist()
        is_leaf = np.ones(len(parents), bool)
        is_leaf[self.parent_rows[self.parent_rows >= 0]] = False
        for leaf in np.flatnonzero(is_leaf).tolist():
            path, row = [], leaf
            while row >= 0:
                path.append(row)
                row = parents[row]
            yield np.array(path[::-1], np.int64)


def pack_rows(rows: Sequence[tuple[Any, ...]]) -> StoredBlocks:
    """Turn rows (slot, hash, parent, checksum, namespace id) of the database into arrays.

    Raises:
        ValueError: a hash of another length.
    """
    slots, hashes, parents, checksums, namespace_ids = zip(*rows, strict=True)
    return StoredBlocks(
        np.array(slots, np.int64),
        np.frombuffer(b"".join(hashes), np.uint8).reshape(len(rows), HASH_BYTES),
        np.frombuffer(b"".join(parents), np.uint8).reshape(len(rows), HASH_BYTES),
        np.array(checksums, np.int64).view(np.uint64),
        np.array(namespace_ids, np.int64),
    )


def link_rows(blocks: StoredBlocks, num_slots: int) -> LoadedBlocks:
    """Find each block's parent, and put parents before children."""
    usable = (blocks.slots < num_slots) & ~_is_repeated(blocks.hashes)
    dropped = blocks.slots[~usable]
    if len(dropped):
        blocks = blocks.take(usable)
    parents = _find_parents(blocks)
    depths = _depths(parents)
    order = np.argsort(depths, kind="stable")
    order = order[np.count_nonzero(depths < 0) :]
    new_row = np.full(len(blocks) + 1, -1, np.int64)  # the last entry stands for "no parent", which is -1
    new_row[order] = np.arange(len(order))
    orphans = np.concatenate([dropped, blocks.slots[depths < 0]])
    return LoadedBlocks(blocks.take(order), new_row[parents[order]], orphans)


def _words(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """View hashes as uint64 `[num_blocks, 4]`."""
    return np.ascontiguousarray(hashes).view(np.uint64)


def _is_repeated(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether an earlier row has the same hash."""
    words = _words(hashes)
    repeated = np.zeros(len(words), bool)
    first = np.sort(words[:, 0])
    if (first[1:] != first[:-1]).all():
        return repeated
    order = np.lexsort(words.T)  # stable
    repeated[order[1:]] = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    return repeated


def _find_parents(blocks: StoredBlocks) -> _Ints:
    """Return the row of each parent: -1 for none, -2 for one that is missing. REQUIRES: no hash is repeated."""
    words, wanted = _words(blocks.hashes), _words(blocks.parents)
    rows = np.full(len(words), -2, np.int64)
    order = np.argsort(words[:, 0], kind="stable")
    first = words[order, 0]
    at = np.searchsorted(first, wanted[:, 0])
    todo = np.arange(len(words))
    # One pass, but for hashes that share their first 64 bits: those stand side by side, and are tried one by one.
    while len(todo):
        todo = todo[at[todo] < len(words)]
        todo = todo[first[at[todo]] == wanted[todo, 0]]
        candidates = order[at[todo]]
        same = (words[candidates] == wanted[todo]).all(axis=1)
        rows[todo[same]] = candidates[same]
        todo = todo[~same]
        at[todo] += 1
    rows[~wanted.any(axis=1)] = -1
    return rows


def _depths(parents: _Ints) -> _Ints:
    """Return each row's distance from the first block of its sequence, or -1 when it cannot be reached from there.

    Every pass doubles the distance walked, so that a chain of a million blocks takes twenty; a circle never ends.
    """
    count = len(parents)
    root, missing = count, count + 1
    jump = np.append(parents, [root, missing])
    jump[jump == -1] = root
    jump[jump == -2] = missing
    depth = np.append(np.ones(count, np.int64), [0, 0])
    for _ in range(count.bit_length()):
        if (jump >= count).all():
            break
        depth += depth[jump]
        jump = jump[jump]
    return np.where(jump[:count] == root, depth[:count] - 1, -1)
