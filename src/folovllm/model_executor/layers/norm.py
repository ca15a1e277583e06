"""Root mean square normalisation. Mirrors vllm/model_executor/layers/layernorm.py."""

import torch

from folovllm.model_executor.build import BuildContext


class RMSNorm:
    """x / rms(x) * weight over the last axis (`Ops.rms_norm` says how it rounds)."""

    def __init__(self, context: BuildContext, name: str, size: int, eps: float) -> None:
        self.ops = context.ops
        self.weight = context.vector(f"{name}.weight", size)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, size]` -> the same."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual += x` in place; returns its norm."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
