"""Root mean square normalisation."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis.

    Normalises in fp32, rounds to the input's dtype, then scales: the order of transformers, which decides the last bit.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any leading shape, last axis `size`."""
        wide = x.float()
        variance = wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.eps)).to(x.dtype)
