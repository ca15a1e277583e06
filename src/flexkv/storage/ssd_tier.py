"""The SSD tier as its worker sees it: the store on disk, and in memory what a slot holds.

slot   has_row   is_stored   checksum   tag
 0      yes       yes         8f3a..    first 8 bytes of the block's hash: a load that expects another block fails
 1      yes       no          -         its row could be neither deleted nor inserted for certain
 2      no        no          -         free, or being written
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from flexkv.common.config import GIB, SsdTierConfig
from flexkv.common.transfer import BlockIds
from flexkv.storage.ssd_files import num_slots_for, slot_bytes
from flexkv.storage.ssd_rows import LoadedBlocks, StoredBlocks
from flexkv.storage.ssd_store import SsdStore


class SlotTable:
    """What the slots hold. One thread changes it; others read slots that are not being changed."""

    def __init__(self, num_slots: int) -> None:
        """Start with nothing stored."""
        self._checksums = np.zeros(num_slots, np.uint64)
        self._tags = np.zeros(num_slots, np.uint64)
        self._is_stored = np.zeros(num_slots, np.bool_)
        self._has_row = np.zeros(num_slots, np.bool_)

    def __len__(self) -> int:
        return len(self._checksums)

    def note(self, slots: BlockIds, hashes: npt.NDArray[np.uint8], checksums: npt.NDArray[np.uint64]) -> None:
        """These slots hold these blocks (uint8 `[num_blocks, 32]`), and the index says so."""
        self._checksums[slots] = checksums
        self._tags[slots] = _tags(hashes)
        self._has_row[slots] = True
        self._is_stored[slots] = True

    def doubt(self, slots: BlockIds) -> None:
        """Nothing is served from these slots any more; the index may still name them."""
        self._has_row[slots] = True
        self._is_stored[slots] = False

    def forget(self, slots: BlockIds | None) -> None:
        """The index does not name these slots any more; None for all."""
        where = slice(None) if slots is None else slots
        self._is_stored[where] = False
        self._has_row[where] = False

    def with_rows(self, slots: BlockIds) -> BlockIds:
        """Return those of the slots that the index may name."""
        return slots[self._has_row[slots]]

    def look_up(
        self, slots: BlockIds, hashes: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Return which slots hold these blocks, and the checksums of all."""
        return self._is_stored[slots] & (self._tags[slots] == _tags(hashes)), self._checksums[slots]


class SsdTier:
    """Owns the directories of the tier until `close`, which is idempotent.

    Attributes:
        store: the files and the index; the index belongs to the worker's writing thread once that runs.
        slots: what they hold; written by that thread.
        config: how they are read and written.
    """

    def __init__(self, config: SsdTierConfig, block_bytes: int, fingerprint: Mapping[str, str]) -> None:
        """Open the tier, and find what an earlier process has stored in it.

        Raises:
            ConfigError: smaller than one block, or a directory that is in use, not writable, full, or holds blocks of
                something else.
            TransferError: the index cannot be changed.
        """
        self.config = config
        if config.num_blocks is not None:
            num_slots = config.num_blocks
        else:
            assert config.size_gb is not None
            num_slots = num_slots_for(int(config.size_gb * GIB), block_bytes)
        self.store = SsdStore(config.directories, num_slots, block_bytes, fingerprint, config.durability)
        try:
            self.slots = SlotTable(num_slots)
            self._found: LoadedBlocks | None = self._load()
        except BaseException:
            self.store.close()
            raise

    def _load(self) -> LoadedBlocks:
        found = self.store.index.load(len(self.slots))
        self.store.index.delete(found.orphan_slots)
        blocks = found.blocks
        self.slots.note(blocks.slots, blocks.hashes, blocks.checksums)
        return found

    @property
    def num_slots(self) -> int:
        """Blocks that the tier has room for."""
        return len(self.slots)

    @property
    def num_bytes(self) -> int:
        """Bytes it takes on disk."""
        return self.num_slots * slot_bytes(self.store.block_bytes)

    def take_found(self) -> LoadedBlocks:
        """Return what was stored when the tier was opened, parents before children; once."""
        assert self._found is not None, "taken twice"
        found, self._found = self._found, None
        return found

    def forget(self, slots: BlockIds | None) -> None:
        """Delete the rows of slots, None for all. REQUIRES: the index's thread.

        Raises:
            TransferError: the disk refused; the slots are not served any more, but may be after a restart.
        """
        if slots is None:
            self.slots.doubt(np.arange(len(self.slots)))
            self.store.index.clear()
        else:
            slots = self.slots.with_rows(slots)
            if len(slots) == 0:
                return
            self.slots.doubt(slots)
            self.store.index.delete(slots)
        self.slots.forget(slots)

    def insert(self, blocks: StoredBlocks) -> None:
        """Note blocks whose data are written (and synced, for `Durability.POWER`). REQUIRES: the index's thread.

        Raises:
            TransferError: the disk refused; none of them is stored.
        """
        self.slots.doubt(blocks.slots)
        self.store.index.insert(blocks)
        self.slots.note(blocks.slots, blocks.hashes, blocks.checksums)

    def close(self) -> None:
        """Close it. REQUIRES: the worker has ended."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tags(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(hashes[:, :8]).view(np.uint64).reshape(-1)
