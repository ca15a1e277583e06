"""Every tier's storage of one store, made from its configuration.

open    CPU pool, SSD tier, remote store          all errors of the configuration come here
later   bind_layout                               with the first device worker: what a block's bytes mean is known
close   remote store, SSD tier, CPU pool          after every worker has stopped
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Self

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.fingerprint import LAYOUT_FIELD, block_fingerprint, fingerprint_text
from flexkv.common.storage import PoolLayout
from flexkv.common.transfer import BlockContent
from flexkv.errors import ConfigError, TransferError
from flexkv.storage.allocator import CpuPool
from flexkv.storage.remote.factory import open_remote_store
from flexkv.storage.remote.keys import block_key
from flexkv.storage.remote.resilient import ResilientStore
from flexkv.storage.ssd_tier import SsdTier

logger = logging.getLogger(__name__)


class StorageEngine:
    """Owns the storage of all tiers. `close` is idempotent; call it after every worker has stopped.

    Attributes:
        cpu_pool: the CPU tier; with an SSD tier its blocks begin at multiples of 4096 bytes.
        ssd: the SSD tier, if there is one.
        remote: the remote store, if there is one; closed with the engine.
    """

    def __init__(self, model: ModelConfig, cache: CacheConfig) -> None:
        """Open every configured tier.

        Raises:
            ConfigError: a tier is too small for one block or larger than the machine allows; an SSD directory is in
                use, cannot be written, or holds blocks of something else; the remote URL has an unknown scheme or
                option, or needs an extra that is not installed. Nothing stays open then.
        """
        self._model = model
        self._cache = cache
        block_bytes = model.block_bytes(cache.tokens_per_block)
        padding = cache.pool_block_stride(model) - block_bytes
        self._lock = threading.Lock()
        self._layout: str | None = None  # protected by _lock; set once
        self._remote_fingerprint = ""  # set before _layout, constant after
        self.ssd: SsdTier | None = None
        self.remote: ResilientStore | None = None
        with contextlib.ExitStack() as stack:
            layout = PoolLayout(cache.num_cpu_blocks(model), block_bytes, padding=padding)
            self.cpu_pool = stack.enter_context(CpuPool.create(layout))
            if cache.ssd is not None:
                self.ssd = stack.enter_context(_open_ssd(cache, block_fingerprint(model, cache), block_bytes))
            if cache.remote is not None:
                resilience = cache.remote.resilience
                remote = open_remote_store(cache.remote.url, block_bytes=block_bytes, resilience=resilience)
                self.remote = stack.enter_context(remote)
            self._stack = stack.pop_all()

    def bind_layout(self, device_layout: str) -> None:
        """Hear how the engine lays out its blocks (`DeviceLayout.fingerprint`), once a device worker has said so.

        To be called before the first op of any tier; later calls with the same layout do nothing. Any thread.

        Raises:
            ConfigError: another layout is bound already, or the blocks of the SSD tier have another.
            TransferError: the index of the SSD tier cannot be changed.
        """
        with self._lock:
            if self._layout == device_layout:
                return
            if self._layout is not None:
                raise ConfigError(f"blocks have the layout {self._layout!r} here, not {device_layout!r}")
            if self.ssd is not None:
                self.ssd.store.index.bind(LAYOUT_FIELD, device_layout)
            fingerprint = block_fingerprint(self._model, self._cache, device_layout)
            self._remote_fingerprint = fingerprint_text(fingerprint)
            self._layout = device_layout

    def remote_keys(self, content: BlockContent) -> list[str]:
        """Return the keys of blocks in the remote store.

        Raises:
            TransferError: no layout is bound yet.
        """
        if not self._remote_fingerprint:
            raise TransferError("the layout of blocks is not known before a device worker has registered")
        namespace = content.namespace
        if self._cache.remote is not None and self._cache.remote.namespace is not None:
            namespace = (self._cache.remote.namespace, *namespace)
        return [block_key(namespace, self._remote_fingerprint, row.tobytes()) for row in content.hashes]

    def close(self) -> None:
        """Release everything. REQUIRES: no worker is running."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_ssd(cache: CacheConfig, fingerprint: dict[str, str], block_bytes: int) -> SsdTier:
    assert cache.ssd is not None
    try:
        tier = SsdTier(cache.ssd, block_bytes, fingerprint)
    except TransferError as error:
        raise ConfigError(str(error)) from error
    logger.info("SSD tier open directories=%d slots=%d", len(cache.ssd.directories), tier.num_slots)
    return tier
