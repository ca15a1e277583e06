"""Linear layers. Mirrors vllm/model_executor/layers/linear.py.

A merged layer computes several projections of the same input in one matrix product. It names its parts as the
checkpoint does, and the loader fills each part's rows:

    weight [sum of parts, in_features]  =  q_proj rows | k_proj rows | v_proj rows
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b, with `weight` `[out_features, in_features]` left uninitialised for the loader."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @classmethod
    def sharing(cls, weight: nn.Parameter) -> "Linear":
        """A layer that uses another module's `weight` (tied embeddings)."""
        linear = cls(weight.shape[1], 0)
        linear.weight = weight
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features]`."""
        return F.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several projections of one input. `parts`: the checkpoint's name of each -> its out_features, in row order."""

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self.parts = dict(parts)
