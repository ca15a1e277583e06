"""How much to evict. Who is evicted first is the policy of the native tree (csrc/flexkv/eviction_policy.h)."""

from __future__ import annotations

import math

from flexkv.common.config import EvictionConfig


def num_blocks_to_evict(config: EvictionConfig, num_needed: int, num_free: int, num_blocks: int) -> int:
    """Return how many blocks to evict from a tier of `num_blocks` before `num_needed` of them are taken.

    None while the tier stays at or below its start threshold; then what exceeds it, and at least the evict ratio, so
    that a full tier does not evict on every request.
    """
    num_allowed = math.floor(config.start_threshold * num_blocks)
    num_over = num_blocks - num_free + num_needed - num_allowed
    if num_over <= 0:
        return 0
    return max(num_over, math.floor(config.evict_ratio * num_blocks))
