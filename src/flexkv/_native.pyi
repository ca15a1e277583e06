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
