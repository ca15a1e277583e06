"""The native half of `flexkv`. `cache/` and `transfer/` wrap it; nothing else imports it."""

import numpy as np
import numpy.typing as npt

_Digests = npt.NDArray[np.uint8]
_BlockIds = npt.NDArray[np.int64]

class Mempool:
    """Which blocks are free. See csrc/flexkv/mempool.h. Not thread-safe."""

    def __init__(self, num_blocks: int) -> None: ...
    def allocate(self, num_blocks: int) -> _BlockIds: ...
    def recycle(self, block_ids: _BlockIds) -> None: ...
    def is_free(self, block_id: int) -> bool: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    def memory_bytes(self) -> int: ...

class RadixTree:
    """Which sequences of blocks are held. See csrc/flexkv/radix_tree.h. Not thread-safe.

    Sequences are uint8 `[num_blocks, digest_size]`, contiguous. Misuse raises `flexkv.errors.CacheStateError`.
    """

    def __init__(self, digest_size: int, policy: str) -> None: ...
    def match(self, sequence: _Digests) -> tuple[int, int]:
        """Return (blocks present, blocks ready) of the stored prefix."""
    def lock_prefix(self, sequence: _Digests, ready_only: bool) -> tuple[int, int]:
        """Return (handle, number of blocks) of the locked prefix."""
    def path_block_ids(self, handle: int, first: int, count: int) -> _BlockIds: ...
    def insert(self, handle: int, digests: _Digests, block_ids: _BlockIds) -> int: ...
    def set_ready(self, handle: int, num_blocks: int) -> bool: ...
    def is_attached(self, handle: int) -> bool: ...
    def is_servable(self, handle: int) -> bool: ...
    def remove(self, handle: int, num_blocks: int) -> tuple[_BlockIds, _Digests]:
        """Return (blocks nobody holds any more, digests that could be served before)."""
    def unlock(self, handle: int) -> _BlockIds:
        """Return the blocks nobody holds any more."""
    def evict(self, num_blocks: int) -> tuple[_BlockIds, _Digests]:
        """Return the blocks taken out, and their digests in the same order."""
    def counts(self) -> tuple[int, int, int, int, int]:
        """Return the numbers of (blocks in the index, ready ones of them, detached blocks, nodes, locks)."""
    def memory_bytes(self) -> int: ...
    def all_block_ids(self) -> _BlockIds: ...
    def check_integrity(self) -> None: ...

class DeviceSide:
    """One rank's KV tensors: `dims` are (size, stride in bytes), in the order the pool keeps them."""

    def __init__(
        self,
        layers: list[int],
        num_blocks: int,
        block_stride: int,
        dims: list[tuple[int, int]],
        element_bytes: int,
    ) -> None: ...

class PoolSide:
    """The pool as one rank sees it; `offset` bytes into each block its slice begins."""

    def __init__(self, base: int, num_blocks: int, block_stride: int, offset: int) -> None: ...

class HostTransfer:
    """Copies blocks between the two sides. See csrc/flexkv/transfer_host.h. Thread-safe; releases the GIL."""

    def __init__(self, device: DeviceSide, pool: PoolSide, num_threads: int) -> None: ...
    def copy(
        self,
        *,
        to_device: bool,
        device_blocks: _BlockIds,
        pool_blocks: _BlockIds,
        first_layer: int,
        num_layers: int,
    ) -> None: ...
    @property
    def layer_bytes(self) -> int: ...

class SsdOptions:
    """How an `SsdTransfer` works; see csrc/flexkv/transfer_ssd.h for the bounds.

    Up to `queue_depth` requests of at most `io_bytes` (a multiple of 4096) each are in flight. `backend` is "auto",
    "io_uring" or "threads", of which there are `num_threads`. `drain_timeout_ms`: how long to wait, after a deadline,
    for requests that the disk does not give back.
    """

    def __init__(
        self,
        *,
        queue_depth: int = 128,
        io_bytes: int = 1048576,
        backend: str = "auto",
        num_threads: int = 8,
        register_memory: bool = True,
        direct: bool = True,
        drain_timeout_ms: int = 30000,
    ) -> None:
        """Raise ValueError for an unknown backend; `SsdTransfer` checks the rest."""

class SsdTransfer:
    """Moves batches of blocks between the pool and the SSD tier's files. See csrc/flexkv/transfer_ssd.h.

    One caller at a time; releases the GIL. Statuses are int32 `[num_blocks]`: 0, or an errno of that block alone, of
    which EBADMSG is a wrong checksum, ETIMEDOUT the deadline, and EINPROGRESS a request that never came back: its pool
    block must never be used again, and later calls raise `flexkv.errors.TransferError`.
    """

    def __init__(
        self, *, paths: list[str], block_bytes: int, num_slots: int, pool: PoolSide, options: SsdOptions
    ) -> None:
        """Open files that exist. If `options` say so, the pool is pinned, piece by piece as it comes into use.

        Raises:
            ValueError: options or sizes that make no sense.
            OSError: a file cannot be opened or is too small, or the backend asked for is not to be had.
        """
    def write(
        self, slots: _BlockIds, pool_blocks: _BlockIds, timeout_s: float
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
        """Write pool block i to slot i; return (statuses, checksums). IndexError, ValueError: nothing was moved."""
    def read(
        self, slots: _BlockIds, pool_blocks: _BlockIds, checksums: npt.NDArray[np.uint64], timeout_s: float
    ) -> npt.NDArray[np.int32]:
        """Read slot i into pool block i, check it, return the statuses. IndexError, ValueError: nothing was moved."""
    def sync(self) -> None:
        """Return when all that was written survives a loss of power. Raises OSError."""
    @property
    def backend(self) -> str:
        """Return "io_uring" or "threads"."""
    @property
    def is_direct(self) -> bool:
        """Whether every file is read and written past the page cache."""
    @property
    def is_bounced(self) -> bool:
        """Whether blocks are copied through aligned buffers, because the pool is not laid out in multiples of 4096."""
    @property
    def is_memory_registered(self) -> bool:
        """Whether io_uring has taken the pool's pages as far as they have been used."""
    @property
    def fallbacks(self) -> list[str]:
        """Why it is not all that was asked for, for the log; empty when it is."""
    def counters(self) -> tuple[int, int, int]:
        """Return the numbers of requests, of short ones (continued), and of interrupted ones (repeated)."""

def checksum(data: npt.NDArray[np.uint8]) -> int:
    """Return the XXH3-64 of contiguous bytes; releases the GIL."""

def checksum_isa() -> str:
    """Return which instructions compute it here: "avx512", "avx2" or "portable". The value is the same."""
