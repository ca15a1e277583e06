"""Each option does to the logits what its definition says, row by row, and nothing to rows without it."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sample.logits_processor.builtin import AUTHORITIES, OTHERS
from folovllm.sample.logits_processor.interface import LogitsState, ProcessedRow
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.logprobs import gather_logprobs
from folovllm.sample.ops.penalties import TokenCounts
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams

VOCAB = 50
NEVER = float("-inf")
NONE = np.zeros(0, np.int64)


def make_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def make_row(
    index: int, prompt: list[int], output: list[int], bad_words: tuple[tuple[int, ...], ...] = (), **options: Any
) -> ProcessedRow:
    state = LogitsState.create(SamplingParams(**options), prompt, bad_words)
    assert state is not None
    for token in output:
        state.append(token)
    return ProcessedRow(index, state, np.array(output, dtype=np.int32))


def process(logits: torch.Tensor, *rows: ProcessedRow) -> torch.Tensor:
    logits = logits.clone()
    for processor in (*AUTHORITIES, *OTHERS):
        processor.apply(logits, rows)
    return logits


def metadata_of(num_rows: int, **fields: Any) -> SamplingMetadata:
    defaults = {
        "temperature": np.ones(num_rows, np.float32),
        "top_k": np.zeros(num_rows, np.int64),
        "top_p": np.ones(num_rows, np.float32),
        "seeds": np.zeros(num_rows, np.uint64),
        "output_positions": np.arange(num_rows),
        "masked_rows": NONE,
        "masked_token_ids": NONE,
    }
    return SamplingMetadata(**{**defaults, **fields})


def penalised(logits: list[float], prompt: list[int], output: list[int], p: SamplingParams) -> list[float]:
    result = []
    for token, value in enumerate(logits):
        if token in prompt or token in output:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        value -= p.frequency_penalty * output.count(token)
        value -= p.presence_penalty * (token in output)
        result.append(value)
    return result


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=200)


@settings(max_examples=50, deadline=None)
@given(
    prompt=tokens,
    output=tokens,
    repetition=st.sampled_from([1.0, 0.5, 1.1, 2.0]),
    frequency=st.sampled_from([0.0, -2.0, 0.7]),
    presence=st.sampled_from([0.0, -1.5, 2.0]),
)
def test_penalties_are_their_definition(prompt, output, repetition, frequency, presence):
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    if not params.has_penalties:
        return
    logits = make_logits(3)
    options = {name: getattr(params, name) for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")}
    row = make_row(1, prompt, output, **options)
    got = process(logits, row)
    expected = torch.tensor(penalised(logits[1].tolist(), prompt, output, params))
    torch.testing.assert_close(got[1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[[0, 2]], logits[[0, 2]])


def test_penalties_of_several_rows_do_not_mix():
    logits = make_logits(4)
    options = [{"repetition_penalty": 1.5}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}]
    rows = [make_row(i + 1, [i, 7], [i + 10] * 3, **options[i]) for i in range(3)]
    together = process(logits, *rows)
    for row in rows:
        assert torch.equal(process(logits, row)[row.index], together[row.index])


@settings(max_examples=30, deadline=None)
@given(prompt=tokens, first=tokens, kept=st.integers(0, 200), more=tokens)
def test_counts_can_be_set_to_other_outputs(prompt, first, kept, more):
    counts, output = TokenCounts(prompt), first[:kept] + more
    for token in first:
        counts.append(token)
    counts.sync(output)
    found = dict(zip(counts.token_ids.tolist(), counts.counts.tolist(), strict=True))
    assert found == {token: output.count(token) for token in {*prompt, *output}}


def test_bias_and_allowed_ids():
    logits = make_logits(2)
    got = process(logits, make_row(1, [], [], logit_bias={3: 5.0, 4: -7.5}, allowed_token_ids=(3, 3, 9)))
    assert torch.equal(got[0], logits[0])
    assert torch.nonzero(got[1] > NEVER).flatten().tolist() == [3, 9]
    assert got[1, 3] == logits[1, 3] + 5.0
    assert got[1, 9] == logits[1, 9]


@pytest.mark.parametrize(
    ("output", "masked"),
    [([], [1]), ([2], [1]), ([2, 3], [1, 4]), ([9, 2, 3], [1, 4]), ([3, 2], [1]), ([2, 3, 4], [1]), ([3], [1])],
)
def test_last_token_of_a_bad_word_is_masked_behind_the_others(output, masked):
    got = process(make_logits(1), make_row(0, [2, 3], output, bad_words=((1,), (2, 3, 4))))
    assert torch.nonzero(got[0] == NEVER).flatten().tolist() == masked


def test_bad_words_and_min_tokens_give_way_where_nothing_else_is_left():
    logits = make_logits(2)
    row = make_row(1, [], [], bad_words=((5,), (6,)), allowed_token_ids=(5, 6))
    metadata = metadata_of(2, processed=[row], masked_rows=np.array([0, 1, 1]), masked_token_ids=np.array([5, 5, 7]))
    # Without a choice min_tokens keeps 6, of which bad words would leave nothing.
    assert Sampler().sample(logits.clone(), metadata).tolist()[1] == 6
    only = make_row(1, [], [], allowed_token_ids=(5,))
    metadata = metadata_of(2, processed=[only], masked_rows=np.array([1]), masked_token_ids=np.array([5]))
    assert Sampler().sample(logits.clone(), metadata).tolist()[1] == 5


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_keeps_what_is_likely_enough_and_nothing_else(min_p):
    logits = make_logits(1, seed=4)[0]
    probs = torch.softmax(logits, dim=0)
    expected = set(torch.nonzero(probs >= min_p * probs.max()).flatten().tolist())
    num_rows = 4000
    rows = logits.expand(2 * num_rows, -1).clone()
    shares = np.array([min_p, 0.0] * num_rows, dtype=np.float32)
    drawn = Sampler().sample(rows, metadata_of(2 * num_rows, min_p=shares))
    assert set(drawn[::2].tolist()) <= expected
    likely = {token for token in expected if probs[token] > 0.01}
    assert likely <= set(drawn[::2].tolist())
    free = metadata_of(num_rows, output_positions=np.arange(num_rows) * 2 + 1)
    assert torch.equal(drawn[1::2], Sampler().sample(logits.expand(num_rows, -1).clone(), free))


def test_logprobs_are_those_of_the_logits_before_any_option():
    logits = make_logits(3)
    row = make_row(1, [], [], allowed_token_ids=(8,))
    wanted = np.array([-1, 3, 0])
    output = Sampler()(logits.clone(), metadata_of(3, processed=[row], num_logprobs=wanted))
    assert set(output.logprobs) == {1, 2}
    reference = torch.log_softmax(logits, dim=-1)
    report = output.logprobs[1]
    best = reference[1].topk(3)
    assert report.logprob_token_ids == [[8, *best.indices.tolist()]]
    assert report.logprobs[0] == pytest.approx([reference[1, 8].item(), *best.values.tolist()])
    assert report.sampled_token_ranks == [int((reference[1] >= reference[1, 8]).sum())]
    chosen = int(output.sampled_token_ids[2])
    assert output.logprobs[2].logprob_token_ids == [[chosen]]


def test_rank_counts_from_one():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, 1.0]])
    assert gather_logprobs(logits, torch.tensor([1, 0]), 0).sampled_token_ranks == [1, 2]


def test_a_row_with_options_does_not_depend_on_its_batch():
    dice = random.Random(3)
    logits = make_logits(24, seed=7)
    options = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {1: 4.0, 2: -100.0}},
        {"allowed_token_ids": tuple(range(0, VOCAB, 3))},
    ]
    rows = [
        make_row(i, dice.choices(range(VOCAB), k=9), dice.choices(range(VOCAB), k=5), ((3,), (4, 5)), **options[i % 4])
        for i in range(24)
    ]
    shares = np.array([0.0, 0.2] * 12, dtype=np.float32)
    together = Sampler().sample(logits.clone(), metadata_of(24, processed=rows, min_p=shares)).tolist()
    for i, row in enumerate(rows):
        single = ProcessedRow(0, row.state, row.output_token_ids)
        metadata = metadata_of(1, processed=[single], min_p=shares[i : i + 1], output_positions=np.array([i]))
        assert Sampler().sample(logits[i : i + 1].clone(), metadata).tolist() == [together[i]]


def test_a_request_without_options_has_no_state():
    assert LogitsState.create(SamplingParams(temperature=0.5, top_k=3, min_p=0.1, logprobs=2), [1, 2]) is None
