"""Small integers in int32 words, and what they stand for: the tensors of AutoGPTQ and GPTQModel checkpoints.

For a linear layer of N outputs and K inputs, with `pack = 32 / bits` values to a word, the first in the low bits:

    qweight  int32 [K / pack, N]        q, packed along K
    qzeros   int32 [groups, N / pack]   zero points, packed along N; the "gptq" format stores them less one
    scales   fp16, bf16 or fp32 [groups, N]
    g_idx    int32 [K]                  the group of each input

    W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])
"""

from dataclasses import dataclass

import torch

_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """The four tensors of one layer."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def named(self) -> dict[str, torch.Tensor]:
        """By their suffixes in a checkpoint."""
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales, "g_idx": self.g_idx}


def pack_words(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Integers of `bits` bits, two-dimensional, to int32 words along `dim`, whose size must fill words."""
    pack = 32 // bits
    assert values.shape[dim] % pack == 0
    rows, columns = values.shape
    grouped = values.long().view((rows // pack, pack, columns) if dim == 0 else (rows, columns // pack, pack))
    shifts = torch.arange(0, 32, bits).view(-1, 1) if dim == 0 else torch.arange(0, 32, bits)
    words = (grouped << shifts).sum(dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The inverse of `pack_words`, as int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = words.unsqueeze(dim + 1) >> (shifts.view(-1, 1) if dim == 0 else shifts)
    masked: torch.Tensor = values & (2**bits - 1)
    return masked.flatten(dim, dim + 1)


def pack_zeros(zeros: torch.Tensor, bits: int, zero_offset: int) -> torch.Tensor:
    """Zero points `[groups, N]` to words; `zero_offset` is 1 for the "gptq" format, 0 for "gptq_v2".

    The offset is taken off the word as a whole, as GPTQModel does: a zero point of 0 borrows from its neighbour.
    """
    return pack_words(zeros, bits, 1) - _ones(bits, zero_offset)


def unpack_zeros(qzeros: torch.Tensor, bits: int, zero_offset: int) -> torch.Tensor:
    """The zero points of all columns, int32 `[groups, N]`."""
    return unpack_words(qzeros + _ones(bits, zero_offset), bits, 1)


def dequantize(packed: PackedTensors, bits: int, zero_offset: int) -> torch.Tensor:
    """The weight as fp32 `[N, K]`."""
    q = unpack_words(packed.qweight, bits, 0)
    zeros = unpack_zeros(packed.qzeros, bits, zero_offset)
    groups = packed.g_idx.long()
    return ((q - zeros[groups]).float() * packed.scales.float()[groups]).t().contiguous()


def _ones(bits: int, factor: int) -> torch.Tensor:
    return torch.tensor(_ONES[bits] * factor, dtype=torch.int32)
