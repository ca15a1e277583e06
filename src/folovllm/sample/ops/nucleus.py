"""The top-p set of a flat distribution, without sorting the vocabulary.

A radix selection by probability mass. The bits of non-negative floats order like the floats themselves, so the mass is
summed into bins by the upper bits; the bin in which the sum from the top reaches top_p is split by the next bits in the
same way, and so on. That gives the smallest weight in the set; of equal ones the lowest token ids belong to it.
"""

import torch

DIGIT_BITS = 10
SHIFTS = (20, 10, 0)  # a float up to 1 has 30 significant bits: 0x3F800000


def keep_nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero what lies outside the smallest set of tokens that reaches `top_p` of the total weight.

    Args:
        weights: `[num_rows, vocab_size]` fp32, not negative, at most 1.
        top_p: `[num_rows]` in (0, 1).

    Returns:
        A new tensor like `weights`.
    """
    wanted = (top_p.double() * weights.sum(dim=-1, dtype=torch.float64))[:, None]
    above = torch.zeros_like(wanted)
    bits = weights.view(torch.int32)
    prefix = torch.zeros(len(weights), 1, dtype=torch.int32, device=weights.device)
    for shift in SHIFTS:
        inside = bits >> (shift + DIGIT_BITS) == prefix
        digits = (bits >> shift) & (2**DIGIT_BITS - 1)
        masses = weights.new_zeros(len(weights), 2**DIGIT_BITS)
        masses = masses.scatter_add_(1, digits.long(), weights.masked_fill(~inside, 0.0)).double()
        down_to = above + masses.flip(-1).cumsum(dim=-1).flip(-1)
        # It falls from digit to digit; rounding may keep even the lowest just short of what is wanted.
        digit = ((down_to >= wanted).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        above = down_to.gather(1, digit) - masses.gather(1, digit)
        prefix = (prefix << DIGIT_BITS) | digit.int()

    tied = bits == prefix
    num_tied = torch.ceil((wanted - above) / prefix.view(torch.float32)).clamp(min=1.0)
    kept = (bits > prefix) | (tied & (tied.cumsum(dim=-1) <= num_tied))
    return weights.masked_fill(~kept, 0.0)
