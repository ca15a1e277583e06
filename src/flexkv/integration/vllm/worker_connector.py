"""The worker half: opens the gate of the step's copies, and reports the ends of earlier ones."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from flexkv.integration.config import ResolvedConfig
from flexkv.integration.stats import FlexKVStats, StatsInterval
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadSpec
from flexkv.server.client import KVTPClient
from flexkv.server.runtime_dir import store_dir, store_name

logger = logging.getLogger(__name__)


class WorkerConnector:
    """Called by the model runner's thread only. Owns this rank's device worker.

    Copies begin here, not when the scheduler half launched them: by now the engine has prepared the blocks of the step,
    and computed those of all steps before.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        """Make the client of the engine's store, which need not exist yet.

        Raises:
            ConfigError: the runtime directory's path is too long.
        """
        self._timeout_s = config.cache.transfer.op_timeout_s
        self._client = KVTPClient(
            store_dir(config.runtime_dir, store_name(config.store_key, config.dp_rank)),
            config.rank,
            config.model,
            config.cache.tokens_per_block,
            gated=True,
            num_copy_threads=config.cache.transfer.num_copy_threads,
        )
        self._metadata: FlexKVConnectorMetadata | None = None
        self._loading: dict[int, tuple[str, LoadSpec]] = {}  # by task
        self._saving: dict[int, str] = {}  # by task
        self._not_launched: set[str] = set()  # requests whose load failed before it began
        self._invalid_block_ids: set[int] = set()
        self._interval = StatsInterval()

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Take the engine's KV tensors and begin to look for the store.

        Raises:
            ConfigError: their layout is not known.
        """
        self._client.register(kv_caches)

    def bind_connector_metadata(self, metadata: FlexKVConnectorMetadata | None) -> None:
        """Take the step's metadata; without this call, `start_load_kv` asks vLLM for it."""
        self._metadata = metadata

    def clear_connector_metadata(self) -> None:
        """The step is over."""
        self._metadata = None

    def start_load_kv(self) -> None:
        """Let the step's loads and saves begin."""
        metadata = self._metadata if self._metadata is not None else _metadata_from_vllm()
        if metadata is None:
            return
        tasks: list[int] = []
        for request_id, load in metadata.loads.items():
            if load.task_id is None:
                self._invalid_block_ids.update(load.block_ids)
                self._not_launched.add(request_id)
                continue
            self._loading[load.task_id] = (request_id, load)
            tasks.append(load.task_id)
        for request_id, task_id in metadata.saves.items():
            self._saving[task_id] = request_id
            tasks.append(task_id)
        if tasks:
            self._client.release(tasks, self._timeout_s)

    def get_finished(self) -> tuple[set[str], set[str]]:
        """Return the requests whose (saves, loads) ended since the last call, also those that failed."""
        saved: set[str] = set()
        loaded, self._not_launched = self._not_launched, set()
        for task_id, error in self._client.take_ended().items():
            if task_id in self._saving:
                saved.add(self._saving.pop(task_id))
                continue
            request_id, load = self._loading.pop(task_id)
            loaded.add(request_id)
            if error:
                logger.warning("load failed request_id=%s blocks=%d error=%s", request_id, len(load.block_ids), error)
                self._invalid_block_ids.update(load.block_ids)
        return saved, loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks whose load failed since the last call."""
        invalid, self._invalid_block_ids = self._invalid_block_ids, set()
        return invalid

    def get_kv_connector_stats(self) -> FlexKVStats | None:
        """Return what was copied since the last call."""
        return self._interval.take(self._client.stats)

    def shutdown(self) -> None:
        """Let the running copy end and leave the store. Idempotent."""
        self._client.close()


def _metadata_from_vllm() -> FlexKVConnectorMetadata | None:
    """The step's metadata, which vLLM hands to its own wrapper of this connector and not to us."""
    module = sys.modules.get("vllm.distributed.kv_transfer")
    if module is None:
        return None
    metadata = module.get_kv_transfer_group()._get_connector_metadata()
    return metadata if isinstance(metadata, FlexKVConnectorMetadata) else None
