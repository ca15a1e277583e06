"""The Triton kernel of wide nuclei against sorting: on a GPU, or without one in Triton's interpreter."""

import os

import numpy as np
import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or Triton's interpreter"
    ),
]
DEVICE = "cpu" if IS_INTERPRETED else "cuda"


def draw(logits: torch.Tensor, top_p: list[float], uniform: list[float], wide: list[bool]) -> list[int]:
    from folovllm.sample.ops.triton_nucleus import draw_wide

    tokens = torch.full((len(logits),), -7, dtype=torch.int64, device=DEVICE)
    draw_wide(
        logits.to(DEVICE),
        torch.tensor(wide, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.tensor(uniform, dtype=torch.float64, device=DEVICE),
        tokens,
    )
    return tokens.tolist()


def by_sorting(logits: torch.Tensor, top_p: float, uniform: float) -> tuple[int, set[int]]:
    """The token, and those beside it on which rounding may decide."""
    weights = torch.softmax(logits.double(), dim=-1).numpy()
    order = np.lexsort((np.arange(len(weights)), -weights))
    ends = np.cumsum(weights[order])
    nucleus = np.sort(order[: int(np.searchsorted(ends, top_p - 1e-9)) + 1])
    cumulative = np.cumsum(weights[nucleus])
    at = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(nucleus[at]), {int(t) for t in nucleus[max(at - 1, 0) : at + 2]}


@pytest.mark.parametrize("vocab_size", [257, 1500])
@pytest.mark.parametrize("has_equals", [False, True], ids=["distinct", "many equal logits"])
def test_wide_nucleus_is_that_of_sorting(vocab_size, has_equals):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator)
    if has_equals:
        logits = (logits * 4).round() / 4
    top_p = [0.3, 0.5, 0.8, 0.9, 0.99, 0.999]
    for uniform in (0.0, 0.37):
        drawn = draw(logits, top_p, [uniform] * 6, [True] * 6)
        for row, token in enumerate(drawn):
            expected, near = by_sorting(logits[row], top_p[row], uniform)
            assert token == expected or token in near


def test_rows_that_are_not_wide_keep_their_token():
    logits = torch.randn(3, 300)
    drawn = draw(logits, [0.9] * 3, [0.5] * 3, [False, True, False])
    assert (drawn[0], drawn[2]) == (-7, -7)
    assert drawn[1] == by_sorting(logits[1], 0.9, 0.5)[0]


def test_masked_tokens_are_never_drawn():
    logits = torch.full((1, 700), float("-inf"))
    logits[0, 100:400] = 0.0
    # 0.5 of 300 equal tokens: the first 150.
    assert [draw(logits, [0.5], [u], [True])[0] for u in (0.0, 0.5001, 0.9999)] == [100, 175, 249]
