"""Token ids -> chained block hashes, bit for bit vLLM's.

    tokens   | block 0         | block 1         | ... | tail (not full: no hash)
    digests    h0 = H(none_hash, tokens 0, extra 0)
                                 h1 = H(h0, tokens 1, extra 1)

`none_hash = H(seed)`. H serialises its argument, by canonical CBOR or by pickle, and digests the bytes by SHA-256 (32
bytes) or XXH3-128 (16 bytes). Source: vLLM's `hash_block_tokens` and `init_none_hash`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from kvblocks import _native
from kvblocks.errors import InvalidHashInputError, UnknownAlgorithmError
from kvblocks.extra_keys import ExtraKeys, KeyValue, build_extra_keys, encode_cbor, normalise_per_block

__all__ = ["ALGORITHMS", "BlockHasher", "TokenIds", "build_extra_keys", "external_hash", "external_hashes"]

ALGORITHMS: Final = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
"""Names of the hash algorithms, as vLLM's `--prefix-caching-hash-algo` spells them."""

DEFAULT_SEED: Final = "vllm-none-hash"
"""Seed of the SHA-256 algorithms when none is given; the xxhash ones take a random seed then."""

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]] | memoryview
"""Token ids: a list or tuple of int, or a one-dimensional array or buffer of any integer type."""

_EXTERNAL_BYTES = 8
_MAX_TOKEN = 2**32 - 1


def external_hash(digest: bytes) -> int:
    """Return the form of a digest that events carry: its low 64 bits, that is, its last 8 bytes read big-endian.

    Raises:
        InvalidHashInputError: the digest is shorter than 8 bytes.
    """
    if len(digest) < _EXTERNAL_BYTES:
        raise InvalidHashInputError(f"a block digest has at least 8 bytes, this one has {len(digest)}")
    return int.from_bytes(digest[-_EXTERNAL_BYTES:], "big")


def external_hashes(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the external hash of every row of `packed` (uint8 `[num_blocks, digest_size]`) as uint64 `[num_blocks]`.

    Raises:
        InvalidHashInputError: `packed` has another shape or type.
    """
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] < _EXTERNAL_BYTES:
        raise InvalidHashInputError(
            f"packed digests are uint8 [num_blocks, digest_size >= 8], not {packed.dtype} {list(packed.shape)}"
        )
    low = np.ascontiguousarray(packed[:, -_EXTERNAL_BYTES:])
    return low.view(">u8").astype(np.uint64).reshape(len(packed))


class BlockHasher:
    """Hashes the full blocks of a token sequence; immutable, so one hasher serves any number of threads.

    Attributes:
        algorithm: one of `ALGORITHMS`.
        seed: what `none_hash` is the hash of.
        block_size: tokens per block.
        digest_size: bytes per digest, 32 for the sha256 algorithms and 16 for the xxhash ones.
        none_hash: the digest that stands for the parent of block 0.
    """

    def __init__(self, algorithm: str = "sha256_cbor", seed: str | None = None, block_size: int = 16) -> None:
        """Build a hasher that agrees with every engine of the same algorithm, seed and block size.

        Args:
            algorithm: one of `ALGORITHMS`.
            seed: the engine's PYTHONHASHSEED. None stands for an engine without one: a fixed seed for the sha256
                algorithms, a fresh random one for the xxhash ones, which are not collision resistant.
            block_size: tokens per block, at least 1.

        Raises:
            UnknownAlgorithmError: no such algorithm.
            InvalidHashInputError: a seed that is not a string, or a block size below 1.
        """
        if algorithm not in ALGORITHMS:
            raise UnknownAlgorithmError(f"unknown hash algorithm {algorithm!r}; allowed are {', '.join(ALGORITHMS)}")
        if seed is not None and not isinstance(seed, str):
            raise InvalidHashInputError(f"seed is a string or None, not {type(seed).__name__} ({seed!r})")
        if not isinstance(block_size, int) or block_size < 1:
            raise InvalidHashInputError(f"block_size is an int of at least 1, not {block_size!r}")
        is_sha256 = algorithm.startswith("sha256")
        is_cbor = algorithm.endswith("_cbor")
        if seed is None:
            seed = DEFAULT_SEED if is_sha256 else os.urandom(32).hex()
        self.algorithm: Final = algorithm
        self.seed: Final = seed
        self.block_size: Final = block_size
        self._digest: Final[Callable[[bytes], bytes]] = _sha256 if is_sha256 else xxhash.xxh3_128_digest
        self.none_hash: Final[bytes] = self._digest(encode_cbor(seed) if is_cbor else _pickle(seed))
        self.digest_size: Final = len(self.none_hash)
        self._native: Final = _native.BlockHasher(algorithm, self.none_hash, block_size) if is_cbor else None

    def hash_blocks(
        self, token_ids: TokenIds, extra_keys: ExtraKeys | None = None, parent: bytes | None = None
    ) -> list[bytes]:
        """Return the digest of every full block, in order; see `hash_blocks_packed` for the arguments and errors."""
        return _native.split_digests(self.hash_blocks_packed(token_ids, extra_keys, parent))

    def hash_blocks_packed(
        self, token_ids: TokenIds, extra_keys: ExtraKeys | None = None, parent: bytes | None = None
    ) -> npt.NDArray[np.uint8]:
        """Return the digests of the full blocks as one contiguous uint8 array `[num_blocks, digest_size]`.

        Args:
            token_ids: ids in 0..2**32-1; a tail shorter than a block is not hashed. Never modified.
            extra_keys: None, or one entry per full block, each None or the tuple of that block's extra keys.
            parent: digest of the block before the first of these; None at the start of a sequence.

        Raises:
            InvalidHashInputError: a token id out of range or not an integer, extra keys of the wrong number or type,
                or a parent that is not a digest of this algorithm.
        """
        tokens = _token_array(token_ids)
        num_blocks = len(tokens) // self.block_size
        keys = normalise_per_block(extra_keys, num_blocks)
        if parent is not None and (not isinstance(parent, bytes) or len(parent) != self.digest_size):
            raise InvalidHashInputError(f"parent is a digest of {self.digest_size} bytes or None, not {parent!r}")
        if self._native is None:
            return self._hash_pickles(tokens, num_blocks, keys, parent or self.none_hash)
        out = np.empty((num_blocks, self.digest_size), np.uint8)
        extra_bytes, extra_offsets = _encode_extra_keys(keys)
        self._native.hash_chain(tokens, parent or b"", extra_bytes, extra_offsets, out)
        return out

    def _hash_pickles(
        self, tokens: npt.NDArray[np.uint32], num_blocks: int, keys: list[KeyValue] | None, parent: bytes
    ) -> npt.NDArray[np.uint8]:
        ids = tokens.tolist()  # plain ints: pickle would name numpy's types
        digests = bytearray()
        for i in range(num_blocks):
            block = tuple(ids[i * self.block_size : (i + 1) * self.block_size])
            parent = self._digest(_pickle((parent, block, keys[i] if keys is not None else None)))
            digests += parent
        return np.frombuffer(digests, np.uint8).reshape(num_blocks, self.digest_size)


def _token_array(token_ids: TokenIds) -> npt.NDArray[np.uint32]:
    """Return `token_ids` as a contiguous uint32 array, itself if it is one already."""
    if isinstance(token_ids, (list, tuple)):
        copy = np.empty(len(token_ids), np.uint32)
        num_copied = _native.copy_tokens(token_ids, copy)
        if num_copied < len(copy):
            # The list may have been shortened by another thread meanwhile.
            culprit = repr(token_ids[num_copied]) if num_copied < len(token_ids) else "gone"
            raise InvalidHashInputError(
                f"token_ids[{num_copied}] is {culprit}; token ids are integers in 0..{_MAX_TOKEN}"
            )
        return copy
    array = np.asarray(token_ids)
    if array.ndim != 1:
        raise InvalidHashInputError(f"token ids are one-dimensional, these have shape {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise InvalidHashInputError(f"token ids are integers in 0..{_MAX_TOKEN}, these are {array.dtype}")
    if array.size and not np.can_cast(array.dtype, np.uint32):
        for index in (int(array.argmin()), int(array.argmax())):
            if not 0 <= array[index] <= _MAX_TOKEN:
                raise InvalidHashInputError(f"token_ids[{index}] is {array[index]}; allowed are 0..{_MAX_TOKEN}")
    return np.ascontiguousarray(array, np.uint32)


def _encode_extra_keys(keys: list[KeyValue] | None) -> tuple[bytes, npt.NDArray[np.uint64]]:
    """Return the CBOR of all blocks' extra keys end to end, and where each block's begin (nothing for None)."""
    if keys is None:
        return b"", np.empty(0, np.uint64)
    encoded = [b"" if key is None else encode_cbor(key) for key in keys]
    offsets = np.zeros(len(keys) + 1, np.uint64)
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    return b"".join(encoded), offsets


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
