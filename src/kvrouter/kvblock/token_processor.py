"""Token ids -> request keys: the one place that says what enters a block's key.

    root(model)  =  H(seed)                    seed = hash_seed, and the model's name after it unless empty
    digest[i]    =  H([digest[i-1] or root, tokens of block i, extra of block i or null])    (kvblocks' chained hash)
    key[i]       =  low 64 bits of digest[i]

`extra` is what engines publish in `extra_keys` of their events, verbatim: values without tags, in the order LoRA name
(every block), multi-modal items (the blocks they are in), cache salt (block 0 alone). A prompt with salt "s" thus has
`["s"]` on block 0, as a salted `BlockStored` of vLLM says, and meets salted blocks only. When an engine's block covers
several index blocks, its extra keys go to the first of them and the LoRA name alone to the others.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from kvblocks.extra_keys import build_extra_keys, untag_extra_keys
from kvblocks.hashing import BlockHasher, TokenIds, external_hashes
from kvrouter.errors import ConfigError

__all__ = ["ALGORITHMS", "TokenIds", "TokenProcessor"]

ALGORITHMS: Final = ("sha256_cbor", "xxhash_cbor")
"""Hash algorithms that the native index speaks."""

_MAX_MODELS = 1024
_MODEL_SEPARATOR = "\x1f"


class TokenProcessor:
    """Makes request keys; immutable, so any number of threads may use one.

    Attributes:
        block_size: tokens per key.
        hash_seed: what all router replicas that share an index must agree on.
        algorithm: one of `ALGORITHMS`.
    """

    def __init__(self, block_size: int = 16, hash_seed: str = "", algorithm: str = "sha256_cbor") -> None:
        """Build a processor.

        Raises:
            ConfigError: a block size below 1, a seed that is no string, or an unknown algorithm.
        """
        if not isinstance(block_size, int) or isinstance(block_size, bool) or not 1 <= block_size <= 65536:
            raise ConfigError(f"block_size is an int in 1..65536, not {block_size!r}")
        if not isinstance(hash_seed, str):
            raise ConfigError(f"hash_seed is a string, not {hash_seed!r}")
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {algorithm!r}; allowed are {', '.join(ALGORITHMS)}")
        self.block_size: Final = block_size
        self.hash_seed: Final = hash_seed
        self.algorithm: Final = algorithm
        self._hasher = lru_cache(_MAX_MODELS)(self._build_hasher)  # bounded: requests choose the model's name

    def keys(
        self, token_ids: TokenIds, model: str, cache_salt: str | None = None, lora_name: str | None = None
    ) -> npt.NDArray[np.uint64]:
        """Return the keys of the full blocks of a prompt as uint64 `[len(token_ids) // block_size]`.

        Args:
            token_ids: the prompt; a contiguous uint32 array is not copied.
            model: the model's name, as in the topic of its engines' events.
            cache_salt: the request's `cache_salt`; None or empty for none.
            lora_name: name of the LoRA adapter, None for the base model.

        Raises:
            kvblocks.errors.InvalidHashInputError: a token id that is no integer in 0..2**32-1.
        """
        lora = (lora_name, "") if lora_name else None
        extra = None
        if lora or cache_salt:
            num_blocks = len(token_ids) // self.block_size
            extra = untag_extra_keys(build_extra_keys(num_blocks, lora=lora, cache_salt=cache_salt))
        return external_hashes(self._hasher(model).hash_blocks_packed(token_ids, extra))

    def root(self, model: str) -> bytes:
        """Return the digest that stands for the parent of a model's first blocks."""
        return self._hasher(model).none_hash

    def _build_hasher(self, model: str) -> BlockHasher:
        seed = f"{self.hash_seed}{_MODEL_SEPARATOR}{model}" if model else self.hash_seed
        return BlockHasher(self.algorithm, seed=seed, block_size=self.block_size)
