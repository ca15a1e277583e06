"""What a forward pass needs besides its input rows. Mirrors vllm/forward_context.py, passed instead of global."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from folovllm.attention.backends.abstract import AttentionMetadata


class LayerHooks(Protocol):
    """The part of a KV connector that is called layer by layer (core/kv_connector.py)."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Block until the layer's loaded KV is on the device."""
        ...

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """The layer's KV has been computed."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One step: read by the attention layers and by the connector's `start_load_kv`."""

    attn_metadata: AttentionMetadata | None
    """None on a step without tokens."""
    kv_caches: dict[str, torch.Tensor]
    """Layer name -> `[num_blocks, 2, num_kv_heads, block_size, head_size]`."""
    layer_hooks: LayerHooks | None = None
