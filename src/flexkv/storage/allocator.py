"""The CPU tier's pool: shared memory cut into blocks of one size.

    | block 0 |pad| block 1 |pad| ... | block num_blocks-1 |pad|      block = | rank 0 slice | rank 1 slice | ... |

The padding is there with an SSD tier only: it makes every block begin at a multiple of what direct I/O moves.
Which block holds what is the cache layer's business; device workers copy into and out of it by block id.
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from flexkv.common.memory_handle import SharedMemory
from flexkv.common.storage import PoolLayout


class CpuPool:
    """The pool mapped into this process; owns its memory. Any thread may use it, `close` included."""

    def __init__(self, layout: PoolLayout, memory: SharedMemory) -> None:
        """Take memory of `layout.pool_bytes` bytes."""
        assert memory.size == layout.pool_bytes
        self.layout = layout
        self._memory = memory

    @classmethod
    def create(cls, layout: PoolLayout) -> CpuPool:
        """Allocate a pool.

        Raises:
            ConfigError: the system has not that much memory.
        """
        return cls(layout, SharedMemory.create(layout.pool_bytes))

    @classmethod
    def receive(cls, layout: PoolLayout, connection: socket.socket) -> CpuPool:
        """Map the pool another process `send`s.

        Raises:
            TransferError: it did not arrive, or is not of this layout's size.
        """
        return cls(layout, SharedMemory.receive(connection, layout.pool_bytes))

    def send(self, connection: socket.socket) -> None:
        """Let the peer of a connected unix socket map the pool."""
        self._memory.send(connection)

    @property
    def address(self) -> int:
        """Address of block 0 in this process."""
        return self._memory.address

    def blocks(self) -> npt.NDArray[np.uint8]:
        """Return the pool as uint8 `[num_blocks, block_bytes]`, without a copy; each block is contiguous."""
        padded = self._memory.array().reshape(self.layout.num_blocks, self.layout.block_stride)
        return padded[:, : self.layout.block_bytes]

    def close(self) -> None:
        """Unmap it in this process. REQUIRES: no copy is running here."""
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
