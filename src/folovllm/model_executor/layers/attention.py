"""The attention layer between a model and a backend. Mirrors vllm/attention/layer.py."""

import torch
from torch import nn

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.ops import write_kv
from folovllm.model_executor.forward_context import ForwardContext


class Attention(nn.Module):
    """Writes the step's K and V into this layer's cache, then attends over the cache."""

    def __init__(self, layer_name: str, backend: AttentionBackend) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.backend = backend

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            key: `[num_tokens, num_kv_heads, head_size]`.
            value: as `key`.
            context: the step.

        Returns:
            `[num_tokens, num_heads * head_size]`.
        """
        metadata, kv_cache = context.attn_metadata, context.kv_caches[self.layer_name]
        assert metadata is not None
        if context.layer_hooks is not None:
            context.layer_hooks.wait_for_layer_load(self.layer_name)
        write_kv(kv_cache, key, value, metadata.slot_blocks, metadata.slot_offsets)
        output = self.backend.forward(query, kv_cache, metadata)
        if context.layer_hooks is not None:
            context.layer_hooks.save_kv_layer(self.layer_name, kv_cache, metadata)
        return output.flatten(1)
