"""Draw from the top-p set of a flat distribution, without sorting the vocabulary.

Rejection: draw from all tokens, accept a token that lies in the set. It does if what ranks above it (larger weight, or
the same and a lower id) has less than top_p of the mass. A rejected token and all below it are left out of the next
draw, which keeps the accepted one distributed as in the set. At most about 1 / top_p draws for a row.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from folovllm.sample.random import uniforms

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def draw_nucleus(
    weights: torch.Tensor, top_p: torch.Tensor, uniform: npt.NDArray[np.float64], draw_weighted: Draw
) -> torch.Tensor:
    """Draw one token per row.

    Args:
        weights: `[num_rows, vocab_size]` fp32, not negative; overwritten.
        top_p: `[num_rows]` in (0, 1).
        uniform: `[num_rows]` in [0, 1); further numbers a row needs are derived from its own.
        draw_weighted: (weights, uniforms on their device) -> token ids.

    Returns:
        `[num_rows]` int64 token ids.
    """
    device = weights.device
    tokens = torch.empty(len(weights), dtype=torch.int64, device=device)
    wanted = top_p.double() * weights.sum(dim=-1, dtype=torch.float64)
    token_ids = torch.arange(weights.shape[1], device=device)
    rows, seeds = np.arange(len(weights)), uniform.view(np.uint64)
    attempt = 0
    while True:
        drawn = draw_weighted(weights, torch.from_numpy(uniform).to(device))
        chosen = weights.gather(1, drawn[:, None])
        above = (weights > chosen) | ((weights == chosen) & (token_ids < drawn[:, None]))
        weights.masked_fill_(~above, 0.0)
        accepted = (weights.sum(dim=-1, dtype=torch.float64) < wanted).cpu().numpy()
        done = torch.from_numpy(np.flatnonzero(accepted)).to(device)
        tokens[torch.from_numpy(rows[accepted]).to(device)] = drawn[done]
        if accepted.all():
            return tokens
        again = torch.from_numpy(np.flatnonzero(~accepted)).to(device)
        weights, wanted = weights[again], wanted[again]
        rows, seeds = rows[~accepted], seeds[~accepted]
        attempt += 1
        uniform = uniforms(seeds, np.full(len(rows), attempt))
