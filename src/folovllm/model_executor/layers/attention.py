"""The attention layer between a model and a backend. Mirrors vllm/attention/layer.py."""

from typing import Any

import torch

from folovllm.model_executor.build import BuildContext
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.ops.abstract import HeadLayout


class Attention:
    """Writes the step's K and V into this layer's cache, then attends over the cache."""

    layout: Any

    def __init__(self, context: BuildContext, layer_name: str, layout: HeadLayout) -> None:
        self.layer_name = layer_name
        self.backend = context.backend
        self.ops = context.ops
        context.weights.when_filled(lambda: self._finish(layout))

    def __call__(self, qkv: torch.Tensor, rotation: Any, context: ForwardContext) -> torch.Tensor:
        """Attend.

        Args:
            qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`.
            rotation: of `Ops.prepare_rotation`.
            context: the step.

        Returns:
            `[num_tokens, num_heads * head_size]`.
        """
        metadata, kv_cache = context.attn_metadata, context.kv_caches[self.layer_name]
        assert metadata is not None
        hooks = context.layer_hooks
        if hooks is not None:
            hooks.wait_for_layer_load(self.layer_name)
        query = self.ops.rotate_and_write(self.layout, qkv, rotation, kv_cache, metadata)
        output = self.backend.forward(query, kv_cache, metadata)
        if hooks is not None:
            hooks.save_kv_layer(self.layer_name, kv_cache, metadata)
        return output.view(len(qkv), -1)

    def _finish(self, layout: HeadLayout) -> None:
        self.layout = self.ops.make_layout(layout)
