"""Block hashing in C++ (csrc/kvblocks); `kvblocks.hashing` is its face, and checks what it is given."""

import numpy as np
import numpy.typing as npt

class BlockHasher:
    """Hashes chains of blocks by one algorithm over canonical CBOR; immutable and thread-safe."""

    def __init__(self, algorithm: str, none_hash: bytes, block_size: int, portable: bool = False) -> None:
        """`algorithm` is "sha256_cbor" or "xxhash_cbor"; `portable` keeps to plain C++ whatever the CPU has.

        Raises:
            ValueError: another algorithm, a `none_hash` that is not one of its digests, or a block size of 0.
        """

    def hash_chain(
        self,
        tokens: npt.NDArray[np.uint32],
        parent: bytes,
        extra_bytes: bytes,
        extra_offsets: npt.NDArray[np.uint64],
        out: npt.NDArray[np.uint8],
    ) -> None:
        """Write the digests of the full blocks of `tokens` to `out`, uint8 `[num_blocks, digest_size]`; no GIL held.

        `parent` may be empty: the start of a sequence. The extra keys of block i, as CBOR, are
        `extra_bytes[extra_offsets[i]:extra_offsets[i + 1]]`; empty offsets mean that no block has any.

        Raises:
            ValueError: sizes that do not fit together.
        """

def copy_tokens(items: list[int] | tuple[int, ...], out: npt.NDArray[np.uint32]) -> int:
    """Copy `items` to `out`; return how many were copied before the first that is no integer in 0..2**32-1, or all."""

def split_digests(packed: npt.NDArray[np.uint8]) -> list[bytes]:
    """Return the rows of `packed`, uint8 `[num_blocks, digest_size]`, as bytes."""

def sha256_ni_supported() -> bool:
    """Whether this CPU has the SHA extensions, which the native hasher then uses."""
