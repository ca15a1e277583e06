"""Which blocks of one tier are free: the face of the native bitmap."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv import _native
from flexkv.common.transfer import BlockIds


class Mempool:
    """The physical blocks `[0, num_blocks)` of one tier. Not thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        """Make a pool whose blocks are all free."""
        self._native = _native.Mempool(num_blocks)

    def allocate(self, num_blocks: int) -> BlockIds:
        """Take free blocks, neighbours where it can; int64 `[num_blocks]`.

        Raises:
            CacheStateError: fewer are free; nothing was taken.
        """
        return self._native.allocate(num_blocks)

    def recycle(self, block_ids: npt.NDArray[np.integer[Any]]) -> None:
        """Give blocks back.

        Raises:
            CacheStateError: one is not of this pool, free already, or named twice; nothing was given back.
        """
        self._native.recycle(np.ascontiguousarray(block_ids, np.int64))

    def is_free(self, block_id: int) -> bool:
        """Whether a block can be allocated."""
        return self._native.is_free(block_id)

    @property
    def num_free(self) -> int:
        """Number of free blocks."""
        return self._native.num_free

    @property
    def num_blocks(self) -> int:
        """Number of blocks, free and used."""
        return self._native.num_blocks

    def memory_bytes(self) -> int:
        """Memory the bitmap takes, in bytes."""
        return self._native.memory_bytes()
