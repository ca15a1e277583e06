"""The sampler draws from the right distribution, and a row's draw depends on nothing but the row."""

import math

import numpy as np
import pytest
import torch

from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.topk_topp import FIRST_NUCLEUS, draw
from folovllm.sample.random import uniforms
from folovllm.sample.sampler import Sampler

NUM_DRAWS = 8_000


def metadata_of(
    num_rows: int,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    seed: int | None = None,
    masked: list[tuple[int, int]] | None = None,
) -> SamplingMetadata:
    """Rows of one seed at positions 0, 1, ...; or with seeds 0, 1, ... at position 0 if `seed` is None."""
    rows = np.arange(num_rows)
    pairs = np.array(masked or [], dtype=np.int64).reshape(-1, 2)
    return SamplingMetadata(
        temperature=np.broadcast_to(np.float32(temperature), num_rows).copy(),
        top_k=np.broadcast_to(np.int64(top_k), num_rows).copy(),
        top_p=np.broadcast_to(np.float32(top_p), num_rows).copy(),
        seeds=np.full(num_rows, seed, np.uint64) if seed is not None else rows.astype(np.uint64),
        output_positions=rows if seed is not None else np.zeros(num_rows, np.int64),
        masked_rows=pairs[:, 0],
        masked_token_ids=pairs[:, 1],
    )


def counts_of(logits: torch.Tensor, **options: object) -> np.ndarray:
    """How often each token is drawn in NUM_DRAWS rows of the same logits."""
    rows = logits.expand(NUM_DRAWS, -1).clone()
    tokens = Sampler().sample(rows, metadata_of(NUM_DRAWS, **options))
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


def assert_distribution(counts: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square within 5 sigma of its mean; tokens of probability 0 never drawn."""
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    mean = expected[kept] * counts.sum()
    chi2 = ((counts[kept] - mean) ** 2 / mean).sum()
    freedom = kept.sum() - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * max(freedom, 1)), f"chi2 {chi2:.1f} with {freedom} degrees of freedom"


def restricted(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """The distribution by definition: sort, cut, renormalise."""
    scaled = (logits / temperature).double().numpy()
    order = np.argsort(-scaled)
    if 0 < top_k < len(order):
        order = order[:top_k]
    probs = np.exp(scaled[order] - scaled[order].max())
    probs /= probs.sum()
    if top_p < 1.0:
        keep = np.cumsum(probs) - probs < top_p
        order, probs = order[keep], probs[keep] / probs[keep].sum()
    full = np.zeros(len(scaled))
    full[order] = probs
    return full


LOGITS = torch.randn(700, generator=torch.Generator().manual_seed(5)) * 2


@pytest.mark.parametrize("seed", [0, None], ids=["one seed, many positions", "many seeds, one position"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": 9},
        {"top_k": 50},
        {"top_k": 699},
        {"top_k": 700},
        {"top_k": 10_000},
        {"top_p": 0.1},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"top_p": 1e-6},
        {"top_k": 40, "top_p": 0.8, "temperature": 1.5},
        {"top_p": 0.95, "temperature": 20.0},
    ],
    ids=str,
)
def test_draws_follow_the_restricted_distribution(options, seed):
    assert_distribution(counts_of(LOGITS, seed=seed, **options), restricted(LOGITS, **options))


def test_top_p_wider_than_the_first_fetch_reaches_all_its_tokens():
    flat = torch.zeros(FIRST_NUCLEUS * 4)
    counts = counts_of(flat, top_p=0.9, seed=1)
    assert (counts > 0).sum() == math.ceil(0.9 * len(flat))


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9])
def test_ties_at_the_border_of_a_wide_nucleus_go_to_the_lowest_ids(top_p):
    logits = (torch.randn(1000, generator=torch.Generator().manual_seed(8)) * 0.4 * 4).round() / 4
    probs = torch.softmax(logits, dim=0).double()
    order = probs.sort(descending=True, stable=True).indices
    inside = probs[order].cumsum(0) - probs[order] < top_p
    expected = np.zeros(1000)
    expected[order[inside]] = probs[order[inside]] / probs[order[inside]].sum()
    assert (expected > 0).sum() > FIRST_NUCLEUS
    assert_distribution(counts_of(logits, top_p=top_p, seed=4), expected)


def test_whole_vocabulary_draw_reaches_first_and_last_token():
    logits = torch.full((1300,), -20.0)
    logits[[0, 511, 512, 1299]] = 0.0
    assert_distribution(
        counts_of(logits, seed=2), np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum()
    )


def test_uniform_at_the_ends_draws_a_possible_token():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).repeat(6, 1)
    uniform = np.array([0.0, np.nextafter(1.0, 0.0)] * 3)
    tokens = draw(logits, np.array([0, 0, 2, 2, 0, 0]), np.array([1, 1, 1, 1, 0.99, 0.99], np.float32), uniform)
    assert set(tokens.tolist()) <= {1, 3}


def test_zero_skips_leading_segments_without_mass():
    logits = torch.full((1, 1500), float("-inf"))
    logits[0, 1100] = 0.0
    assert draw(logits, np.array([0]), np.array([1.0], np.float32), np.array([0.0])).tolist() == [1100]


def test_greedy_takes_the_most_likely_even_among_sampling_rows():
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    temperature = [0.0, 1.0] * 4
    tokens = Sampler().sample(logits.clone(), metadata_of(8, temperature=temperature, top_k=[5] * 8))
    assert torch.equal(tokens[::2], logits[::2].argmax(dim=-1))


@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_a_greedy_row_takes_the_first_of_equals_alone_and_among_sampling_rows(vocab_size):
    logits = torch.randint(-3, 3, (12, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = float("-inf")
    logits[2, 3] = float("inf")
    options = {"top_k": [0, 5] * 6, "top_p": [0.3, 0.9] * 6}
    mixed = Sampler().sample(logits.clone(), metadata_of(12, temperature=[0.0, 1.0] * 6, **options))
    alone = Sampler().sample(logits[::2].clone(), metadata_of(6, temperature=0.0))
    assert torch.equal(mixed[::2], alone)
    assert torch.equal(alone, logits[::2].argmax(dim=-1))


def test_masked_tokens_are_never_drawn_neither_greedy_nor_sampled():
    logits = torch.zeros(40, 4)
    logits[:, 2] = 10.0
    masked = [(row, token) for row in range(40) for token in (2, 3)]
    tokens = Sampler().sample(logits, metadata_of(40, temperature=[0.0] * 20 + [1.0] * 20, masked=masked))
    assert set(tokens.tolist()) == {0, 1}


def test_a_rows_token_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(64, 5000, generator=generator) * 3
    options = {
        "temperature": [0.0, 0.7, 1.0, 1.3] * 16,
        "top_k": [0, 1, 7, 8, 9, 50, 64, 0] * 8,
        "top_p": [1.0, 0.5, 0.9, 0.99] * 16,
    }
    whole = metadata_of(64, **options, seed=11)
    together = Sampler().sample(logits.clone(), whole).tolist()
    fields = ("temperature", "top_k", "top_p", "seeds", "output_positions")
    none = np.zeros(0, np.int64)
    for row in range(64):
        alone = SamplingMetadata(*(getattr(whole, name)[row : row + 1] for name in fields), none, none)
        assert Sampler().sample(logits[row : row + 1].clone(), alone).tolist() == [together[row]]


def test_bfloat16_logits_are_sampled_in_fp32():
    logits = LOGITS.to(torch.bfloat16)
    assert_distribution(counts_of(logits, seed=3), restricted(logits.float()))


def test_uniforms_are_uniform_and_differ_between_seeds_and_positions():
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200), 200)
    values = uniforms(seeds, positions)
    assert len(np.unique(values)) == len(values)
    assert_distribution(np.histogram(values, bins=64, range=(0, 1))[0], np.full(64, 1 / 64))
    grid = values.reshape(200, 200)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.025


def test_uniforms_are_the_same_numbers_in_every_version():
    values = uniforms(np.array([0, 1, 2**63 - 1], np.uint64), np.array([0, 5, 7]))
    assert values.tolist() == [0.6524484863740322, 0.7743991716672016, 0.6572466933996467]
