"""Perplexity of a transformers model on token windows."""

import math
from typing import Any

import torch
import torch.nn.functional as F


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first; `windows` is `[n, length]`."""
    total, count = 0.0, 0
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)
