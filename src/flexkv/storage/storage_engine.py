"""Every tier's storage of one store, made from its configuration."""

from __future__ import annotations

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.storage import PoolLayout
from flexkv.storage.allocator import CpuPool


class StorageEngine:
    """Owns the storage of all tiers. `close` is idempotent; call it after every worker has stopped."""

    def __init__(self, model: ModelConfig, cache: CacheConfig) -> None:
        """Allocate every configured tier.

        Raises:
            ConfigError: a tier is too small for one block, or larger than the machine allows.
        """
        layout = PoolLayout(cache.num_cpu_blocks(model), model.block_bytes(cache.tokens_per_block))
        self.cpu_pool = CpuPool.create(layout)

    def close(self) -> None:
        """Release what it allocated."""
        self.cpu_pool.close()
