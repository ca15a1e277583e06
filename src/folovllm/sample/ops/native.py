"""Faces of the native sampling kernels, for logits on a CPU (csrc/folovllm/sampling.h)."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from folovllm import _native
from folovllm.dtypes import DTYPE_NAMES


def has_contiguous_rows(logits: torch.Tensor) -> bool:
    """Whether the kernels can read `logits` `[num_rows, vocab_size]`."""
    return logits.device.type == "cpu" and logits.stride(1) == 1 and logits.dtype in DTYPE_NAMES


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, the lowest id among equals; NaN only where there is nothing else.

    Args:
        logits: `[num_rows, vocab_size]` with `has_contiguous_rows`, in fp32, bf16 or fp16.

    Returns:
        `[num_rows]` int64.
    """
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    _native.argmax(
        logits.data_ptr(), num_rows, vocab_size, logits.stride(0), DTYPE_NAMES[logits.dtype], tokens.data_ptr()
    )
    return tokens


def draw(
    logits: torch.Tensor,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float32],
    uniform: npt.NDArray[np.float64],
    min_p: npt.NDArray[np.float32] | None = None,
    temperature: npt.NDArray[np.float32] | None = None,
) -> torch.Tensor:
    """As topk_topp.draw, on fp32 `logits` with `has_contiguous_rows`."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    options: list[npt.NDArray[Any] | None] = [
        np.ascontiguousarray(top_k, np.int64),
        np.ascontiguousarray(top_p, np.float32),
        None if min_p is None else np.ascontiguousarray(min_p, np.float32),
        np.ascontiguousarray(uniform, np.float64),
        None if temperature is None else np.ascontiguousarray(temperature, np.float32),
    ]
    wrong = [len(option) for option in options if option is not None and len(option) != num_rows]
    if wrong or vocab_size == 0:
        raise ValueError(f"{num_rows} rows of {vocab_size} logits with options for {wrong or num_rows} rows")
    k, p, least, u, scale = (0 if option is None else option.ctypes.data for option in options)
    _native.sample(logits.data_ptr(), num_rows, vocab_size, logits.stride(0), scale, k, p, least, u, tokens.data_ptr())
    return tokens
