"""The operations between the matrix products of a model. The counterpart of vllm/_custom_ops.py.

Models are written once against this contract; the implementation is chosen with the device. Rows are tokens. A returned
tensor may be a buffer that the same operation overwrites at its next call of the same width, so it is for the next
operation to read, not to keep.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.ops.workspace import Workspace


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How a row of q, k and v is laid out, and what happens to its heads: one per attention layer.

    row = num_heads query heads | num_kv_heads key heads | num_kv_heads value heads, each of head_size elements
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    """Tokens of one block of the KV cache."""
    cos_sin: torch.Tensor
    """`[max_positions, head_size]`: cos of head_size / 2 angles, then sin (layers/rotary.py)."""
    q_norm: torch.Tensor | None = None
    """`[head_size]`: scales of an RMS norm over each query head; None for no norm."""
    k_norm: torch.Tensor | None = None
    eps: float = 0.0


class Ops(ABC):
    """One instance serves one model; used by one thread."""

    workspace: Workspace | None = None
    """Where native kernels put their results; None: torch's kernels compute."""

    @abstractmethod
    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (`[num_tokens]` int32) of `table` `[vocab_size, size]` as the model's dtype, to be written to."""

    @abstractmethod
    def take_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Rows `indices` (`[n]` int32) of `x` `[num_rows, size]`, which has the model's dtype."""

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last axis of `[num_rows, size]`.

        Normalises in fp32, rounds to the dtype, then scales: the order of transformers, which decides the last bit.
        """

    @abstractmethod
    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`residual += x` in place; returns its `rms_norm`. `x` may be overwritten."""

    @abstractmethod
    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for rows `gate | up` of `[num_rows, 2 * size]`."""

    @abstractmethod
    def prepare_rotation(self, cos_sin: torch.Tensor, positions: torch.Tensor) -> Any:
        """What all layers of a step share to rotate the tokens at `positions`; goes to `rotate_and_write`."""

    @abstractmethod
    def make_layout(self, layout: HeadLayout) -> Any:
        """What `rotate_and_write` takes as its layout; made once per layer, when its weights are loaded."""

    @abstractmethod
    def rotate_and_write(
        self, layout: Any, qkv: torch.Tensor, rotation: Any, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Normalise and rotate the query and key heads, and store K and V in their slots.

        Args:
            layout: of `make_layout`.
            qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`.
            rotation: of `prepare_rotation`.
            kv_cache: the layer's `[num_blocks, 2, num_kv_heads, block_size, head_size]`.
            metadata: the step.

        Returns:
            The queries `[num_tokens, num_heads, head_size]`.
        """
