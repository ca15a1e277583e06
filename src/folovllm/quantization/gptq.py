"""GPTQ of one linear layer: round the inputs' columns one after the other, and make later ones up for the error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). With
H = 2 X X^T of the layer's inputs X and the upper Cholesky factor U of H^-1, column k is rounded to q and the columns
after it move by -(w_k - q) / U[k, k] * U[k, k+1:]: the least change of the layer's output.
"""

from dataclasses import dataclass

import torch

from folovllm.quantization.errors import QuantizationError
from folovllm.quantization.packing import PackedTensors, pack_words, pack_zeros

BLOCK_SIZE = 128
"""Columns; groups begin and end with blocks, or lie inside one, or are all of K."""


@dataclass(frozen=True, slots=True)
class GPTQOptions:
    """How layers are quantised."""

    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale and a zero point; -1: all."""
    sym: bool = True
    """Zero points are all 2^(bits-1)."""
    desc_act: bool = False
    """Round the inputs with the largest activations first; groups then lie scattered over K."""
    damp_percent: float = 0.01
    """Added to H's diagonal, as a share of its mean."""


class Hessian:
    """Mean of 2 x x^T over a layer's inputs x, fp32 `[K, K]`; doubles as the inputs come."""

    def __init__(self, num_inputs: int) -> None:
        self.matrix = torch.zeros(num_inputs, num_inputs)
        self.num_rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs `[..., K]`."""
        rows = x.flatten(0, -2).float()
        total = self.num_rows + len(rows)
        self.matrix.mul_(self.num_rows / total).addmm_(rows.t(), rows, alpha=2 / total)
        self.num_rows = total


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer's integers, and what they stand for."""

    q: torch.Tensor
    """int32 `[K, N]`."""
    zeros: torch.Tensor
    """int32 `[groups, N]`."""
    scales: torch.Tensor
    """fp32 `[groups, N]`, rounded to the dtype they will be stored in."""
    g_idx: torch.Tensor
    """int32 `[K]`."""

    def dequantized(self) -> torch.Tensor:
        """fp32 `[N, K]`."""
        groups = self.g_idx.long()
        return ((self.q - self.zeros[groups]).float() * self.scales[groups]).t().contiguous()

    def packed(self, bits: int, zero_offset: int, scale_dtype: torch.dtype) -> PackedTensors:
        """As a checkpoint stores it."""
        return PackedTensors(
            qweight=pack_words(self.q, bits, 0),
            qzeros=pack_zeros(self.zeros, bits, zero_offset),
            scales=self.scales.to(scale_dtype),
            g_idx=self.g_idx,
        )


def quantize_layer(
    weight: torch.Tensor, hessian: torch.Tensor, options: GPTQOptions, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """Quantise `weight` `[N, K]` for inputs with this `hessian` `[K, K]`; neither is changed.

    Raises:
        QuantizationError: the weights or the inputs are not finite.
    """
    weight, hessian = weight.float().clone(), hessian.clone()
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise QuantizationError("a layer's weights or inputs are not finite")
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that were always 0: any weight will do
    diagonal[dead] = 1
    weight[:, dead] = 0
    num_inputs = weight.shape[1]
    size = num_inputs if options.group_size == -1 else options.group_size
    order = torch.argsort(diagonal, descending=True) if options.desc_act else torch.arange(num_inputs)
    weight, hessian = weight[:, order], hessian[order][:, order]
    q, zeros, scales = _round_columns(
        weight, _inverse_factor(hessian, options.damp_percent), size, options, scale_dtype
    )
    places = torch.argsort(order)
    return QuantizedLayer(
        q=q[:, places].t().contiguous(), zeros=zeros, scales=scales, g_idx=(places // size).to(torch.int32)
    )


def round_to_nearest(weight: torch.Tensor, options: GPTQOptions, scale_dtype: torch.dtype) -> QuantizedLayer:
    """The same grid without error compensation: what GPTQ is compared with."""
    num_inputs = weight.shape[1]
    size = num_inputs if options.group_size == -1 else options.group_size
    weight = weight.float()
    parts = [_grid(weight[:, k : k + size], options, scale_dtype) for k in range(0, num_inputs, size)]
    scales = torch.stack([scale for scale, _ in parts])
    zeros = torch.stack([zero for _, zero in parts])
    g_idx = torch.arange(num_inputs) // size
    q = _round(weight.t(), scales[g_idx], zeros[g_idx], options.bits)
    return QuantizedLayer(q=q, zeros=zeros, scales=scales, g_idx=g_idx.to(torch.int32))


def _inverse_factor(hessian: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped H^-1; damped more where rounding made H indefinite."""
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian))
    damp = damp_percent
    while damp < 1:
        factor, info = torch.linalg.cholesky_ex(hessian + identity * (damp * mean))
        if info.item() == 0:
            upper: torch.Tensor
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if info.item() == 0:
                return upper
        damp *= 4
    raise QuantizationError("a layer's inputs give no positive definite Hessian, however damped; use other text")


def _round_columns(
    weight: torch.Tensor, upper: torch.Tensor, size: int, options: GPTQOptions, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[N, K]`, zeros and scales `[groups, N]`, K in the order given. Changes `weight`.

    Errors reach the columns of the same block at once, and those beyond it when the block is done:

        | done | block: k, then k+1 ... | rest |
    """
    num_outputs, num_inputs = weight.shape
    q = torch.empty(num_outputs, num_inputs, dtype=torch.int32)
    grids: list[tuple[torch.Tensor, torch.Tensor]] = []
    for begin in range(0, num_inputs, BLOCK_SIZE):
        end = min(begin + BLOCK_SIZE, num_inputs)
        errors = torch.empty(num_outputs, end - begin)
        for k in range(begin, end):
            if k % size == 0:
                grids.append(_grid(weight[:, k : k + size], options, scale_dtype))
            scale, zero = grids[-1]
            column = weight[:, k]
            q[:, k] = _round(column, scale, zero, options.bits)
            error = (column - scale * (q[:, k] - zero)) / upper[k, k]
            weight[:, k + 1 : end] -= torch.outer(error, upper[k, k + 1 : end])
            errors[:, k - begin] = error
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return q, torch.stack([zero for _, zero in grids]), torch.stack([scale for scale, _ in grids])


def _grid(group: torch.Tensor, options: GPTQOptions, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of `[N, group]`, so that the range of the row, with 0, is covered."""
    largest = 2**options.bits - 1
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    if options.sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / largest).to(scale_dtype).float()
    # Rows of zeros, and such as would underflow: any scale that the format can hold.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if options.sym:
        zero = torch.full_like(scale, 2 ** (options.bits - 1), dtype=torch.int32)
    else:
        zero = torch.round(-low / scale).clamp(0, largest).to(torch.int32)
    return scale, zero


def _round(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return (torch.round(values / scale) + zero).clamp(0, 2**bits - 1).to(torch.int32)
