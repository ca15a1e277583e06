"""Token ids -> the digests that name their blocks in every tier.

    token_ids   | block 0 | block 1 | ... | tail (not a full block: dropped)
    digests       h0        h1              h0 = H(root, tokens 0), h1 = H(h0, tokens 1), ...

The store's own root (model, layout) and the caller's namespace make the root of the chain, so that two of either have
no digest in common.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv.errors import InvalidRequestError
from kvblocks.errors import InvalidHashInputError
from kvblocks.hashing import BlockHasher, TokenIds

Namespace = str | tuple[str, ...] | None
"""Who may share blocks: None for everybody, or one or more strings such as a cache salt."""


@dataclass(frozen=True, slots=True, eq=False)
class SequenceMeta:
    """A token sequence and the digests of its full blocks; immutable, and independent of the caller's arrays.

    Attributes:
        token_ids: integers `[num_tokens]`, a private read-only copy.
        block_hashes: uint8 `[num_blocks, digest_size]`, contiguous.
        tokens_per_block: tokens in each block.
        namespace: the caller's part of the chain's root, empty for the common namespace; events carry it.
    """

    token_ids: npt.NDArray[np.integer[Any]]
    block_hashes: npt.NDArray[np.uint8]
    tokens_per_block: int
    namespace: tuple[str, ...] = ()

    @classmethod
    def from_tokens(
        cls,
        token_ids: TokenIds,
        tokens_per_block: int,
        hasher: BlockHasher,
        namespace: Namespace = None,
        root: tuple[str, ...] = (),
    ) -> SequenceMeta:
        """Hash the full blocks of `token_ids` (1-D integers: list, numpy array or CPU tensor of any integer type).

        `root` is what all blocks of a store have in common: its model and layout.

        Raises:
            InvalidRequestError: ids that are not one-dimensional integers in 0..2**32-1, a namespace that is not made
                of strings, or a hasher for another block size.
        """
        if hasher.block_size != tokens_per_block:
            raise InvalidRequestError(
                f"the hasher is for blocks of {hasher.block_size} tokens, the cache has {tokens_per_block} per block"
            )
        labels = normalise_namespace(namespace)
        tokens = _copy_tokens(token_ids)
        parent = chain_root(hasher, labels, root)
        try:
            block_hashes = hasher.hash_blocks_packed(tokens, parent=parent)
        except InvalidHashInputError as error:
            raise InvalidRequestError(str(error)) from error
        return cls(tokens, block_hashes, tokens_per_block, labels)

    @property
    def num_blocks(self) -> int:
        """Number of full blocks."""
        return len(self.block_hashes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the unaligned tail included."""
        return len(self.token_ids)

    def block_tokens(self, first_block: int, num_blocks: int) -> list[int]:
        """Return the token ids of blocks `[first_block, first_block + num_blocks)` as plain integers."""
        size = self.tokens_per_block
        tokens: list[int] = self.token_ids[first_block * size : (first_block + num_blocks) * size].tolist()
        return tokens


def normalise_namespace(namespace: Namespace) -> tuple[str, ...]:
    """Return a namespace as a tuple of strings: empty for None, one element for a string.

    Raises:
        InvalidRequestError: it is neither None, a string, nor a tuple of strings.
    """
    if namespace is None:
        return ()
    if isinstance(namespace, str):
        return (namespace,)
    if isinstance(namespace, tuple) and all(isinstance(label, str) for label in namespace):
        return namespace
    raise InvalidRequestError(f"a namespace is None, a string or a tuple of strings, not {namespace!r}")


def chain_root(hasher: BlockHasher, namespace: tuple[str, ...], root: tuple[str, ...] = ()) -> bytes:
    """Return the digest that stands before block 0 of every sequence of a store's `root` and a caller's `namespace`."""
    if not namespace and not root:
        return hasher.none_hash
    return _chain_root(hasher.algorithm, hasher.none_hash, namespace, root)


@lru_cache(maxsize=4096)
def _chain_root(algorithm: str, none_hash: bytes, namespace: tuple[str, ...], root: tuple[str, ...]) -> bytes:
    # The digest of a seed that spells the hasher's own root and the labels; JSON keeps ("a", "b") apart from ("ab",).
    return BlockHasher(algorithm, seed=json.dumps([none_hash.hex(), root, namespace])).none_hash


def _copy_tokens(token_ids: TokenIds) -> npt.NDArray[np.integer[Any]]:
    """Copy, because the sequence outlives the call and the caller may reuse its buffer."""
    array = np.asarray(token_ids)
    if array.ndim != 1:
        raise InvalidRequestError(f"token ids are one-dimensional, these have shape {list(array.shape)}")
    if array.size == 0:
        array = np.empty(0, np.uint32)
    if array.dtype.kind not in "iu":
        raise InvalidRequestError(f"token ids are integers, these are {array.dtype}")
    tokens = array.copy()
    tokens.flags.writeable = False
    return tokens
