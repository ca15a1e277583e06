"""The KV connector contract: vLLM's KVConnectorBase_V1, so that one connector class serves both engines.

A connector has two halves built from the same class. The *scheduler* half decides what can be loaded and what shall be
kept; the *worker* half moves bytes next to the device memory. Metadata travels from the first to the second inside
`SchedulerOutput.kv_connector_metadata`. Connectors are loaded by dotted name and never imported by this package.
Mirrors vllm/distributed/kv_transfer/kv_connector/v1/base.py.
"""

import enum
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from folovllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from folovllm.config import EngineConfig
    from folovllm.core.sched.output import KVConnectorOutput, SchedulerOutput
    from folovllm.request import Request

# Short names users may write in `kv_connector`, as in vLLM's own registry.
KNOWN_CONNECTORS = {"FlexKVConnectorV1": "flexkv.integration.vllm.vllm_v1_adapter.FlexKVConnectorV1Impl"}


class KVConnectorRole(enum.Enum):
    """Which half of the connector is being built."""

    SCHEDULER = 0
    WORKER = 1


class BlocksView(Protocol):
    """The blocks of a request as connectors see them (vLLM's KVCacheBlocks)."""

    def get_block_ids(self) -> tuple[list[int], ...]:
        """Block ids per KV cache group; this engine has exactly one group."""
        ...


@runtime_checkable
class KVConnector(Protocol):
    """Both halves of a connector. Each hook says who calls it and when."""

    # -- scheduler half: called by the scheduler's thread ---------------------------------------------------------
    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many more tokens the store has beyond the device's hit, and whether they load asynchronously.

        None means "not known yet, ask again in a later step". Called when a waiting request is considered, so again in
        each step in which there was no room for it, and again after a preemption; never after one of its loads failed.
        A synchronous load leaves at least the last token to compute: more than that is cut off.
        """
        ...

    def update_state_after_alloc(self, request: "Request", blocks: BlocksView, num_external_tokens: int) -> None:
        """The request has its blocks now, `num_external_tokens` of them to be loaded (0: nothing to load).

        Called on each admission, and so again, with 0, when the request is admitted after its asynchronous load ended.
        """
        ...

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Any:
        """The metadata for this step's worker half; also resets the per-step state. Called once per step."""
        ...

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """The worker half's report of a step."""
        ...

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request ended, be it before it had any block. True delays freeing them until `finished_sending` names it.

        Blocks that an asynchronous load is still writing stay until `finished_recving` names the request, as well.
        No step computes the request any more; with asynchronous scheduling the worker half may have heard of its end
        (`get_finished`) one step before.
        """
        ...

    def take_events(self) -> Iterable[Any]:
        """KV events (kvblocks.events) of the store's tiers since the last call."""
        ...

    # -- worker half: called by the model runner's thread, each step, also on steps without tokens ----------------
    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        """Layer name -> KV tensor `[num_blocks, 2, num_kv_heads, block_size, head_size]`. Called once."""
        ...

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Hand over the step's metadata, before any other worker hook of the step."""
        ...

    def start_load_kv(self, forward_context: Any) -> None:
        """Begin the loads the metadata names."""
        ...

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Block until this layer of the step's synchronous loads is on the device."""
        ...

    def save_kv_layer(self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: Any) -> None:
        """A layer's KV has been computed."""
        ...

    def wait_for_save(self) -> None:
        """Block until the step's saves may no longer be overwritten."""
        ...

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose asynchronous (sending, receiving) has ended."""
        ...

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Device blocks whose load failed since the last call."""
        ...

    def get_kv_connector_stats(self) -> Any:
        """Statistics since the last call, or None."""
        ...

    def clear_connector_metadata(self) -> None:
        """The step is over."""
        ...

    # -- both ------------------------------------------------------------------------------------------------------
    def reset_cache(self) -> bool | None:
        """Forget what the store holds (scheduler half; only when explicitly asked to reset the connector too)."""
        ...

    def shutdown(self) -> None:
        """Release everything; idempotent."""
        ...


def create_connector(config: "EngineConfig", role: KVConnectorRole) -> KVConnector:
    """Build one half of the connector named in `config.kv_transfer_config`.

    Raises:
        ConfigError: no such module or class.
    """
    assert config.kv_transfer_config is not None
    name = config.kv_transfer_config.kv_connector
    module_path = config.kv_transfer_config.kv_connector_module_path
    dotted = f"{module_path}.{name}" if module_path else KNOWN_CONNECTORS.get(name, name)
    module_name, _, class_name = dotted.rpartition(".")
    allowed = f"give one of {', '.join(KNOWN_CONNECTORS)}, or a dotted class name"
    if not module_name:
        raise ConfigError(f"kv_connector={name!r} is not known; {allowed}")
    try:
        connector_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"kv_connector={name!r} cannot be loaded ({error}); {allowed}") from error
    connector: KVConnector = connector_class(config, role)
    return connector
