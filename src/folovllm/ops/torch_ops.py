"""The operations in torch: on any device, and the reference of the others."""

from typing import Any

import torch
import torch.nn.functional as F

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.ops import write_kv
from folovllm.ops.abstract import HeadLayout, Ops

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each `[num_tokens, 1, head_size / 2]`."""


class TorchOps(Ops):
    """Stateless."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """By torch's gather."""
        return F.embedding(ids, table).to(self.dtype)

    def take_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """By torch's gather."""
        return x.index_select(0, indices)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Any leading shape."""
        wide = x.float()
        variance = wide.pow(2).mean(-1, keepdim=True)
        return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Two operations."""
        return self.rms_norm(residual.add_(x), weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Two operations."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def prepare_rotation(self, cos_sin: torch.Tensor, positions: torch.Tensor) -> Angles:
        """The angles of all tokens."""
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin

    def make_layout(self, layout: HeadLayout) -> HeadLayout:
        """The layout itself."""
        return layout

    def rotate_and_write(
        self,
        layout: HeadLayout,
        qkv: torch.Tensor,
        rotation: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Head by head, then one scatter."""
        heads = qkv.view(len(qkv), -1, layout.head_size)
        sizes = [layout.num_heads, layout.num_kv_heads, layout.num_kv_heads]
        query, key, value = torch.split(heads, sizes, dim=1)
        if layout.q_norm is not None and layout.k_norm is not None:
            query = self.rms_norm(query, layout.q_norm, layout.eps)
            key = self.rms_norm(key, layout.k_norm, layout.eps)
        write_kv(kv_cache, _rotate(key, rotation), value, metadata.slot_blocks, metadata.slot_offsets)
        return _rotate(query, rotation)


def _rotate(x: torch.Tensor, angles: Any) -> torch.Tensor:
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
