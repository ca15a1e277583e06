"""Memory that several processes share and that cannot be left behind.

The memory has no name in any directory: it is an anonymous file (memfd) whose descriptor travels to other processes
over a unix socket (SCM_RIGHTS). The kernel frees it when the last process that maps it is gone, also after kill -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import socket
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from flexkv.errors import ConfigError, TransferError


class SharedMemory:
    """A mapping of shared anonymous memory; owns its descriptor and its mapping. `close` is idempotent."""

    def __init__(self, fd: int, size: int) -> None:
        """Map `size` bytes of the descriptor `fd`, which this object owns from now on.

        When the object is dropped without `close`, the mapping lives as long as arrays and copiers that use it.

        Raises:
            TransferError: it cannot be mapped.
        """
        self.size = size
        self._fd = fd
        try:
            self._map = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise TransferError(f"cannot map {size} bytes of shared memory: {error}") from error
        self._closed = False

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        """Make and map `size` bytes of zeroed memory; pages take real memory once they are written.

        Raises:
            ConfigError: the system refuses that much.
        """
        name = f"kvstrata-{os.getpid()}-{secrets.token_hex(4)}"  # seen in /proc/<pid>/maps only
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"cannot make a memory pool of {size} bytes: {error}") from error
        return cls(fd, size)

    @classmethod
    def receive(cls, connection: socket.socket, size: int) -> SharedMemory:
        """Map the memory that the peer `send`s on a connected unix socket, which must have a timeout.

        Raises:
            TransferError: nothing came in time, or memory of another size.
        """
        try:
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        except OSError as error:
            raise TransferError(f"the memory pool did not arrive: {error}") from error
        if not fds:
            raise TransferError("the memory pool did not arrive: the peer closed the connection")
        actual = os.fstat(fds[0]).st_size
        if actual != size:
            os.close(fds[0])
            raise TransferError(f"the memory pool has {actual} bytes, expected were {size}")
        return cls(fds[0], size)

    def send(self, connection: socket.socket) -> None:
        """Send the descriptor to the peer of a connected unix socket."""
        socket.send_fds(connection, [b"\0"], [self._fd])

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the bytes as uint8 `[size]`, without a copy; it must be gone before `close` can unmap them."""
        return np.frombuffer(self._map, np.uint8)

    @property
    def address(self) -> int:
        """Address of the first byte in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        """Unmap and close; others keep their own mapping. With a view still alive the view keeps the mapping."""
        if self._closed:
            return
        self._closed = True
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # an array still looks at it: it goes with that array
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
