"""`FlexKVConnectorV1Impl`: the class that engines load by name. It picks the half for its role and passes calls on.

Source of the contract: vLLM's KVConnectorBase_V1, as its built-in FlexKVConnectorV1 calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flexkv.integration.config import config_for_engine
from flexkv.integration.stats import FlexKVStats
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata
from flexkv.integration.vllm.scheduler_connector import SchedulerConnector
from flexkv.integration.vllm.worker_connector import WorkerConnector
from kvblocks.events import BlockRemoved, BlockStored


class FlexKVConnectorV1Impl:
    """One half of a connector, by role. Turned off, both halves answer that nothing is stored."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        """Build the half for `role` (an enum with members SCHEDULER and WORKER) of an engine's connector.

        Raises:
            ConfigError: a bad option, or a store that cannot be made.
        """
        self._scheduler: SchedulerConnector | None = None
        self._worker: WorkerConnector | None = None
        self._is_vllm = type(vllm_config).__module__.startswith("vllm.")
        options = config_for_engine(vllm_config)
        if not options.enabled:
            return
        config = options.post_init_from_vllm_config(vllm_config)
        # By name: each engine has an enum of its own.
        if role.name == "SCHEDULER":
            self._scheduler = SchedulerConnector(config)
        else:
            self._worker = WorkerConnector(config)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: Mapping[str, Any]) -> bool:
        """Return False: nothing is loaded or saved layer by layer, so whole decode steps may be CUDA graphs."""
        return False

    # -- scheduler half --------------------------------------------------------------------------------------------
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many more tokens the store has, and whether they load asynchronously."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Launch the load, now that the request has blocks."""
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> FlexKVConnectorMetadata:
        """Return what the worker half may begin in this step."""
        if self._scheduler is None:
            return FlexKVConnectorMetadata()
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of the worker half's report of a step."""
        if self._scheduler is not None:
            self._scheduler.update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Store the request's blocks; True while the engine must keep them for that."""
        if self._scheduler is None:
            return False, None
        return self._scheduler.request_finished(request, block_ids)

    def take_events(self) -> Iterable[BlockStored | BlockRemoved]:
        """Return what the store's tiers stored and removed since the last call."""
        return self._scheduler.take_events() if self._scheduler is not None else ()

    def reset_cache(self) -> bool | None:
        """Forget what the store holds; False while copies are under way, None from the half that has no store."""
        return self._scheduler.reset_cache() if self._scheduler is not None else None

    # -- worker half -----------------------------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Take the engine's KV tensors, by layer name."""
        if self._worker is not None:
            self._worker.register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Take the step's metadata."""
        if self._worker is not None:
            self._worker.bind_connector_metadata(connector_metadata)

    def clear_connector_metadata(self) -> None:
        """The step is over."""
        if self._worker is not None:
            self._worker.clear_connector_metadata()

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Let the step's copies begin."""
        if self._worker is not None:
            self._worker.start_load_kv()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: all loads are asynchronous, a request runs when its own has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Do nothing: requests are stored when they finish."""

    def wait_for_save(self) -> None:
        """Return at once: engines keep the blocks of a finished request until they are stored."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """Return the requests whose (saves, loads) ended since the last call."""
        return self._worker.get_finished() if self._worker is not None else (set(), set())

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks whose load failed since the last call."""
        return self._worker.get_block_ids_with_load_errors() if self._worker is not None else set()

    def get_kv_connector_stats(self) -> FlexKVStats | None:
        """Return what was copied since the last call. vLLM takes only a type of its own, so it gets None."""
        return self._worker.get_kv_connector_stats() if self._worker is not None and not self._is_vllm else None

    # -- both ------------------------------------------------------------------------------------------------------
    def shutdown(self) -> None:
        """Release everything. Idempotent."""
        if self._scheduler is not None:
            self._scheduler.shutdown()
        if self._worker is not None:
            self._worker.shutdown()
