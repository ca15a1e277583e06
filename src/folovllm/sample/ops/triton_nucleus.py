"""Draw from nuclei of any width on CUDA, without the host knowing which rows have a wide one."""

# Triton has no type information, and its kernels take none.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: N803 - upper-case parameters are constants of the compilation.

import torch
import triton
import triton.language as tl

_BLOCK = 4096
"""Tokens at a time, by 256 threads."""


def draw_wide(
    logits: torch.Tensor, is_wide: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Draw a token for the rows that `is_wide` marks; the others cost nothing and keep theirs.

    The nucleus is the smallest set of most likely tokens, the lowest id first among equals, with `top_p` of the mass;
    the token is where the cumulative mass of the set, by id, exceeds `uniform` of its total.

    Args:
        logits: `[num_rows, vocab_size]` fp32, contiguous rows.
        is_wide: `[num_rows]` bool.
        top_p: `[num_rows]` fp32 in (0, 1).
        uniform: `[num_rows]` fp64 in [0, 1).
        tokens: `[num_rows]` int64, written to.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    wide_nucleus_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        is_wide,
        top_p,
        uniform.float(),
        tokens,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=8,
        enable_fp_fusion=True,
    )


@triton.jit
def _weights(row_ptr, start, vocab_size, largest, BLOCK: tl.constexpr):
    """exp(logit - largest) of the tokens from `start` on; 0 behind the vocabulary."""
    ids = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
    return tl.exp(logits - largest)


@triton.jit
def wide_nucleus_kernel(
    logits_ptr,  # [num_rows, vocab_size] fp32
    stride_row,
    vocab_size,
    is_wide_ptr,  # [num_rows] bool
    top_p_ptr,  # [num_rows] fp32
    uniform_ptr,  # [num_rows] fp32
    tokens_ptr,  # [num_rows] int64
    BLOCK: tl.constexpr,
):
    """One row: bisect the bits of the least weight in the nucleus, then walk through the vocabulary by id."""
    row = tl.program_id(0)
    if tl.load(is_wide_ptr + row) == 0:
        return
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")))
    largest = tl.max(best, axis=0)

    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        weights = _weights(row_ptr, start, vocab_size, largest, BLOCK)
        sums += weights
    wanted = tl.sum(sums, axis=0) * tl.load(top_p_ptr + row)

    # The bits of floats that are not negative rise as they do. The mass of the weights >= low is enough; of those >
    # high it is not.
    low = 0
    high = 0x3F800000  # 1.0, the largest weight
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab_size, BLOCK):
            weights = _weights(row_ptr, start, vocab_size, largest, BLOCK)
            sums += tl.where(weights.to(tl.int32, bitcast=True) >= middle, weights, 0.0)
        is_enough = tl.sum(sums, axis=0) >= wanted
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, tl.maximum(middle - 1, low))
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        weights = _weights(row_ptr, start, vocab_size, largest, BLOCK)
        sums += tl.where(weights.to(tl.int32, bitcast=True) > low, weights, 0.0)
    above = tl.sum(sums, axis=0)
    least = tl.cast(low, tl.float32, bitcast=True)
    # Of the tokens that weigh exactly `least`, as many as are needed.
    num_equal = tl.maximum(tl.ceil((wanted - above) / tl.maximum(least, 1e-37)), 1.0)
    target = tl.load(uniform_ptr + row) * (above + num_equal * least)

    mass = 0.0
    seen_equal = 0
    last = 0
    found = vocab_size
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        weights = _weights(row_ptr, start, vocab_size, largest, BLOCK)
        bits = weights.to(tl.int32, bitcast=True)
        is_equal = ((bits == low) & (ids < vocab_size)).to(tl.int32)
        rank = seen_equal + tl.cumsum(is_equal, axis=0)
        is_kept = (bits > low) | ((is_equal == 1) & (rank.to(tl.float32) <= num_equal))
        kept = tl.where(is_kept, weights, 0.0)
        ends = mass + tl.cumsum(kept, axis=0)
        found = tl.minimum(found, tl.min(tl.where(is_kept & (ends > target), ids, vocab_size), axis=0))
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, 0), axis=0))
        mass += tl.sum(kept, axis=0)
        seen_equal += tl.sum(is_equal, axis=0)
    # Rounding may lift the target to the total itself.
    tl.store(tokens_ptr + row, tl.where(found < vocab_size, found, last).to(tl.int64))
