"""Draw one token per row under min-p, top-k and top-p, from one uniform number per row.

The vocabulary is never sorted, and no noise is drawn over it: the token is found by inverting the cumulative
distribution, over tokens by falling logit if top-k or top-p restricts the row, else by id. How a row is treated follows
from its own options and logits only, never from its neighbours. On a CPU a native kernel draws. The torch code here
serves other devices: it gives the same tokens, but for rounding and for a nucleus wider than FIRST_NUCLEUS, from which
it draws by rejection, or with Triton by id (`triton_nucleus`).
Mirrors vllm/v1/sample/ops/topk_topp_sampler.py.
"""

import numpy as np
import numpy.typing as npt
import torch

from folovllm.sample.ops import native
from folovllm.sample.ops.nucleus import draw_nucleus
from folovllm.sample.ops.staging import to_device
from folovllm.triton_support import has_triton

SMALLEST_BUCKET = 8
FIRST_NUCLEUS = 64
SEGMENT = 512  # tokens summed first when the whole vocabulary is searched


def draw(
    logits: torch.Tensor,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float32],
    uniform: npt.NDArray[np.float64],
    min_p: npt.NDArray[np.float32] | None = None,
    temperature: npt.NDArray[np.float32] | None = None,
) -> torch.Tensor:
    """Draw from softmax(logits / temperature), restricted per row: min-p, then top-k, then top-p.

    Args:
        logits: `[num_rows, vocab_size]` fp32.
        top_k: `[num_rows]`; 0 keeps all.
        top_p: `[num_rows]` in (0, 1]; applied to what top-k kept, renormalised.
        uniform: `[num_rows]` in [0, 1).
        min_p: `[num_rows]` in [0, 1]; keeps tokens of at least this share of the most likely one's probability.
            None keeps all.
        temperature: `[num_rows]` above 0; None if `logits` are already divided by it.

    Returns:
        `[num_rows]` int64 token ids.
    """
    if native.has_contiguous_rows(logits) and logits.dtype == torch.float32:
        return native.draw(logits, top_k, top_p, uniform, min_p, temperature)
    return draw_with_torch(logits, top_k, top_p, uniform, min_p, temperature)


def draw_with_torch(
    logits: torch.Tensor,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float32],
    uniform: npt.NDArray[np.float64],
    min_p: npt.NDArray[np.float32] | None = None,
    temperature: npt.NDArray[np.float32] | None = None,
) -> torch.Tensor:
    """As `draw`, on any device."""
    if temperature is not None:
        logits = logits / to_device(temperature, logits.device)[:, None]
    if min_p is not None and (min_p > 0.0).any():
        share = to_device(min_p, logits.device)[:, None]
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + share.log(), float("-inf"))
    vocab_size = logits.shape[1]
    top_k = np.where((top_k <= 0) | (top_k >= vocab_size), 0, top_k)
    tokens = torch.empty(len(top_k), dtype=torch.int64, device=logits.device)

    def each(rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        index, p, u = (to_device(a, logits.device) for a in (rows, top_p[rows], uniform[rows]))
        return index, logits if len(rows) == len(top_k) else logits[index], p, u

    buckets = _buckets(top_k, vocab_size)
    for width in np.unique(buckets[top_k > 0]):
        rows = np.flatnonzero((buckets == width) & (top_k > 0))
        index, chosen, p, u = each(rows)
        tokens[index] = _draw_top_k(chosen, int(width), to_device(top_k[rows], logits.device), p, u)
    nucleus = np.flatnonzero((top_k == 0) & (top_p < 1.0))
    if len(nucleus):
        index, chosen, p, u = each(nucleus)
        tokens[index] = _draw_top_p(chosen, p, u)
    free = np.flatnonzero((top_k == 0) & (top_p >= 1.0))
    if len(free):
        index, chosen, _, u = each(free)
        tokens[index] = _draw_weighted(_weights(chosen), u)
    return tokens


def _buckets(top_k: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.int64]:
    """How many candidates to fetch: k rounded up to a power of two, so that few distinct widths arise."""
    power = np.ceil(np.log2(np.maximum(top_k, SMALLEST_BUCKET))).astype(np.int64)
    return np.minimum(np.left_shift(np.int64(1), power), vocab_size).astype(np.int64)


def _draw_top_k(
    logits: torch.Tensor, width: int, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    values, token_ids = logits.topk(width, dim=-1)
    ranks = torch.arange(width, device=logits.device)
    probs = torch.softmax(values.masked_fill(ranks >= top_k[:, None], float("-inf")), dim=-1)
    return _take(token_ids, _invert(_nucleus(probs, top_p), uniform))


def _draw_top_p(logits: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Look among the most likely tokens first; only rows whose nucleus is wider go through the vocabulary."""
    width = min(FIRST_NUCLEUS, logits.shape[1])
    values, token_ids = logits.topk(width, dim=-1)
    probs = torch.exp(values - torch.logsumexp(logits, dim=-1, keepdim=True))
    tokens = _take(token_ids, _invert(_nucleus(probs, top_p), uniform))
    if logits.is_cuda and has_triton():
        from folovllm.sample.ops.triton_nucleus import draw_wide

        draw_wide(logits, probs.sum(dim=-1) < top_p, top_p, uniform, tokens)
        return tokens
    wider = torch.nonzero(probs.sum(dim=-1) < top_p).squeeze(1)
    if len(wider):
        tokens[wider] = draw_nucleus(
            _weights(logits[wider]), top_p[wider], uniform[wider].cpu().numpy(), _draw_weighted
        )
    return tokens


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero what lies outside the smallest set that reaches `top_p`; `probs` falls along each row."""
    before = probs.cumsum(dim=-1) - probs
    return probs.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1.0), 0.0)


def _weights(logits: torch.Tensor) -> torch.Tensor:
    """exp(logits - max), padded with zeros to whole segments."""
    num_rows, vocab_size = logits.shape
    weights = logits.new_zeros(num_rows, vocab_size + -vocab_size % SEGMENT)
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=weights[:, :vocab_size]).exp_()
    return weights


def _draw_weighted(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Over the whole vocabulary: first find the segment, then the token in it."""
    num_rows = len(weights)
    segments = weights.view(num_rows, -1, SEGMENT)
    masses = segments.sum(dim=-1).double()
    ends = masses.cumsum(dim=-1)
    target = _below(uniform * ends[:, -1], ends[:, -1])
    segment = torch.searchsorted(ends, target[:, None], right=True).squeeze(1)
    rows = torch.arange(num_rows, device=weights.device)
    mass = masses[rows, segment]
    within = (target - (ends[rows, segment] - mass)).clamp(min=0.0) / mass
    return segment * SEGMENT + _invert(segments[rows, segment], within)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds `uniform` of the total; its own weight is never zero."""
    ends = weights.cumsum(dim=-1, dtype=torch.float64)
    target = _below(uniform * ends[:, -1], ends[:, -1])
    return torch.searchsorted(ends, target[:, None], right=True).squeeze(1)


def _below(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    # Rounding may lift the product to the total itself, where there is nothing to find.
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _take(token_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return token_ids.gather(1, index[:, None]).squeeze(1)
