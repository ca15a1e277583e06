"""A pool in memory and transfers between it and SSD files, for tests."""

from pathlib import Path

import numpy as np
import pytest

from flexkv import _native
from flexkv.common.memory_handle import SharedMemory

TIMEOUT_S = 60.0


class Pool:
    """Blocks in shared memory, `stride` bytes apart."""

    def __init__(self, num_blocks: int, block_bytes: int, stride: int | None = None) -> None:
        self.num_blocks, self.block_bytes, self.stride = num_blocks, block_bytes, stride or block_bytes
        self.memory = SharedMemory.create(num_blocks * self.stride)
        self.blocks = self.memory.array().reshape(num_blocks, self.stride)[:, :block_bytes]

    def open(self, paths: list[Path], num_slots: int, backend: str = "auto", **options) -> _native.SsdTransfer:
        """Open a transfer; the test is skipped where the system has no io_uring."""
        side = _native.PoolSide(
            base=self.memory.address, num_blocks=self.num_blocks, block_stride=self.stride, offset=0
        )
        try:
            return _native.SsdTransfer(
                paths=[str(path) for path in paths],
                block_bytes=self.block_bytes,
                num_slots=num_slots,
                pool=side,
                options=_native.SsdOptions(backend=backend, **options),
            )
        except OSError as error:
            if "io_uring" in str(error):
                pytest.skip(f"no io_uring here: {error}")
            raise


def ids(values) -> np.ndarray:
    """Block ids as the transfer takes them."""
    return np.array(values, np.int64)
