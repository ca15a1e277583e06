"""The native sampling kernels against a plain sort, against the torch code, and against the distribution they claim."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm import _native
from folovllm.sample.ops import native
from folovllm.sample.ops.topk_topp import FIRST_NUCLEUS, draw, draw_with_torch

Floats = npt.NDArray[np.float64]
ROUNDING = 3e-6  # of cumulative probabilities, by fp32 weights
NUM_DRAWS = 6_000


@pytest.fixture(params=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels limited to a level; one that this machine lacks falls back to a lower one."""
    _native.limit_isa(request.param)
    yield request.param
    _native.limit_isa("amx")


def restricted(
    logits: npt.NDArray[np.float32], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[npt.NDArray[np.int64], Floats]:
    """By definition: the tokens that may be drawn, in the order of the draw, and their probabilities."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.flatnonzero(weights >= min_p) if min_p > 0 else np.arange(len(logits))
    has_top_k = 0 < top_k < len(logits)
    if has_top_k or top_p < 1.0:
        order = order[np.argsort(-logits[order], kind="stable")]
    if has_top_k:
        order = order[:top_k]
    probs = weights[order] / weights[order].sum()
    if top_p < 1.0:
        kept = np.cumsum(probs) - probs < top_p
        order, probs = order[kept], probs[kept] / probs[kept].sum()
    return order, probs


def near_tokens(logits: npt.NDArray[np.float32], uniform: float, **options: float) -> set[int]:
    """What the definition gives, or may give where a border lies within the rounding."""
    tokens: set[int] = set()
    top_p = options.pop("top_p", 1.0)
    for nudge in (-ROUNDING, 0.0, ROUNDING) if top_p < 1.0 else (0.0,):
        order, probs = restricted(logits, top_p=top_p * (1.0 + nudge), **options)
        ends = np.cumsum(probs)
        first, last = np.searchsorted(ends, [uniform - ROUNDING, uniform + ROUNDING], side="right")
        tokens |= set(order[min(first, len(order) - 1) : min(last, len(order) - 1) + 1].tolist())
    return tokens


@st.composite
def rows(draw_from: st.DrawFn) -> npt.NDArray[np.float32]:
    """Logits flat or peaked, with ties or without, some impossible; few or several blocks of them."""
    generator = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    size = draw_from(st.one_of(st.integers(1, 40), st.integers(41, 1200), st.sampled_from([8192, 8193, 12_000])))
    logits = generator.normal(0.0, draw_from(st.sampled_from([0.1, 1.0, 4.0, 30.0])), size)
    if draw_from(st.booleans()):
        logits = np.round(logits * 2) / 2
    if draw_from(st.booleans()):
        logits[generator.random(size) < 0.3] = -np.inf
        logits[generator.integers(size)] = 0.5
    return logits.astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    logits=rows(),
    temperature=st.sampled_from([0.25, 0.9, 1.0, 2.0]),
    top_k=st.one_of(st.just(0), st.integers(1, 80), st.integers(1, 13_000)),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
    min_p=st.one_of(st.just(0.0), st.sampled_from([0.013, 0.31, 1.0])),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)
def test_a_draw_is_what_a_plain_sort_gives(logits, temperature, top_k, top_p, min_p, uniform):
    top_p = float(np.float32(top_p))
    tokens = native.draw(
        torch.from_numpy(logits)[None],
        np.array([top_k]),
        np.array([top_p], np.float32),
        np.array([uniform]),
        np.array([min_p], np.float32),
        np.array([temperature], np.float32),
    )
    options = {"top_k": top_k, "top_p": top_p, "min_p": float(np.float32(min_p)), "temperature": temperature}
    assert tokens.item() in near_tokens(logits, uniform, **options)


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 2500},
    {"top_p": 0.2},
    {"top_p": 0.97},
    {"min_p": 0.02},
    {"top_k": 60, "top_p": 0.9, "min_p": 0.01, "temperature": 1.4},
    {"top_p": 0.9, "temperature": 8.0},
]


def options_of(num_rows: int, options: dict[str, float]) -> tuple[npt.NDArray[np.generic], ...]:
    """top_k, top_p, min_p, temperature of equal rows."""
    return (
        np.full(num_rows, options.get("top_k", 0), np.int64),
        np.full(num_rows, options.get("top_p", 1.0), np.float32),
        np.full(num_rows, options.get("min_p", 0.0), np.float32),
        np.full(num_rows, options.get("temperature", 1.0), np.float32),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_torch_draws_the_same_tokens(options: dict[str, float], scale: float) -> None:
    generator = np.random.default_rng(7)
    logits = torch.from_numpy(generator.normal(0.0, scale, (40, 9_000)).astype(np.float32))
    uniform = generator.random(40)
    top_k, top_p, min_p, temperature = options_of(40, options)
    expected = draw_with_torch(logits, top_k, top_p, uniform, min_p, temperature)
    tokens = draw(logits, top_k, top_p, uniform, min_p, temperature)
    for row, (token, other) in enumerate(zip(tokens.tolist(), expected.tolist(), strict=True)):
        kept, _ = restricted(logits[row].numpy(), **options)
        if "top_p" in options and "top_k" not in options and len(kept) > FIRST_NUCLEUS:
            assert other in kept  # drawn by rejection: from the same distribution, by other numbers
        else:
            assert token == other


@pytest.mark.parametrize("draw_tokens", [draw, draw_with_torch], ids=["native", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options: dict[str, float], draw_tokens: Callable[..., torch.Tensor]) -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0.0, 1.5, 400).astype(np.float32)
    top_k, top_p, min_p, temperature = options_of(NUM_DRAWS, options)
    expanded = torch.from_numpy(logits).expand(NUM_DRAWS, -1).contiguous()
    tokens = draw_tokens(expanded, top_k, top_p, generator.random(NUM_DRAWS), min_p, temperature)
    counts = np.bincount(tokens.numpy(), minlength=400)
    order, probs = restricted(logits, **options)
    assert counts[order].sum() == NUM_DRAWS
    mean = probs * NUM_DRAWS
    chi2, freedom = float(((counts[order] - mean) ** 2 / mean).sum()), max(len(order) - 1, 1)
    # Tokens of small probability lift the variance of the statistic.
    deviation = math.sqrt(2 * freedom + float((1 / mean).sum()))
    assert chi2 <= freedom + 5 * deviation, f"chi2 {chi2:.1f} with {freedom} degrees of freedom"


def test_logits_are_not_changed_and_rows_may_be_strided(level: str) -> None:
    generator = np.random.default_rng(1)
    wide = torch.from_numpy(generator.normal(0.0, 3.0, (6, 500)).astype(np.float32))
    before = wide.clone()
    top_k, top_p, min_p, temperature = options_of(6, {"top_k": 20, "top_p": 0.9, "temperature": 0.7})
    uniform = generator.random(6)
    strided = draw(wide[:, :300], top_k, top_p, uniform, min_p, temperature)
    assert torch.equal(wide, before)
    assert torch.equal(strided, draw(wide[:, :300].contiguous(), top_k, top_p, uniform, min_p, temperature))
    columns = wide[:, :300].t().contiguous().t()  # no contiguous rows: torch draws
    assert torch.equal(strided, draw(columns, top_k, top_p, uniform, min_p, temperature))


def test_options_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 rows of 5 logits with options for \[3\] rows"):
        native.draw(torch.zeros(2, 5), np.zeros(3, np.int64), np.ones(2, np.float32), np.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 77, 40_000])
def test_argmax_is_torchs(level: str, dtype: torch.dtype, size: int) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    expected = [int(np.argmax(row.float().numpy())) for row in logits]  # the lowest of equals, as bf16 has them
    assert native.argmax(logits).tolist() == expected
    assert native.argmax(logits[:, : size // 2 + 1]).tolist() == [
        int(np.argmax(row.float().numpy())) for row in logits[:, : size // 2 + 1]
    ]
