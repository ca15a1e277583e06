"""What the bytes of a block mean, as names and values: the same for stores that may share blocks, else not.

Written into the index of an SSD tier, so that a directory made for something else is refused, and into the keys of a
remote tier, so that stores that differ never meet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from flexkv.common.config import CacheConfig, ModelConfig
from kvblocks.hashing import BlockHasher

FINGERPRINT_VERSION: Final = 1
LAYOUT_FIELD: Final = "layout"
"""The part that is known only once a device worker has registered: `DeviceLayout.fingerprint`."""


def block_fingerprint(model: ModelConfig, cache: CacheConfig, device_layout: str | None = None) -> dict[str, str]:
    """Return everything that gives the bytes of a block their meaning, with the device's layout once it is known.

    The hash enters as the digest that stands before the first block: it depends on algorithm and seed, and the seed,
    which may be a secret, stays one.
    """
    hasher = BlockHasher(cache.hash_algorithm, cache.hash_seed, cache.tokens_per_block)
    fields = {
        "version": str(FINGERPRINT_VERSION),
        "model": model.model_id,
        "num_layers": str(model.num_layers),
        "num_kv_heads": str(model.num_kv_heads),
        "head_size": str(model.head_size),
        "dtype": model.dtype,
        "tp_size": str(model.tp_size),
        "use_mla": str(model.use_mla),
        "tokens_per_block": str(cache.tokens_per_block),
        "hash_algorithm": cache.hash_algorithm,
        "hash_root": hasher.none_hash.hex(),
    }
    return fields if device_layout is None else {**fields, LAYOUT_FIELD: device_layout}


def fingerprint_text(fingerprint: Mapping[str, str]) -> str:
    """Return a fingerprint as one string, the same whatever the order of its fields."""
    return json.dumps(dict(fingerprint), sort_keys=True, separators=(",", ":"))
