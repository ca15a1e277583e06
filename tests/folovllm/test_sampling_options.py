"""Sampling options through the whole engine: front end, core, scheduler, runner, and back."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folovllm.core_fakes import FakeConnector, make_request, make_scheduler
from tests.folovllm.sampling_fixtures import TEXT_SHAPE, make_llm, make_text_model, token_of, tokens_of
from tests.folovllm.serving_fixtures import make_backend
from transformers import PreTrainedModel

from folovllm.entrypoints.llm import LLM
from folovllm.errors import InvalidRequestError
from folovllm.outputs import Logprob, RequestOutput
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams

NUM_OUTPUT = 16
# Requests need up to 10 blocks each: a pool of 24 keeps only a few of 8 running at a time.
TINY_POOL = 25


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with make_llm(text_model) as llm:
        yield llm


@pytest.fixture(scope="module")
def cramped(text_model: Path) -> Iterator[LLM]:
    """Chunks prompts and preempts."""
    with make_llm(text_model, num_kv_blocks=TINY_POOL, max_num_batched_tokens=20) as llm:
        yield llm


@pytest.fixture(scope="module")
def asynchronous(text_model: Path) -> Iterator[LLM]:
    """As `cramped`, with steps scheduled ahead."""
    with make_llm(text_model, num_kv_blocks=TINY_POOL, max_num_batched_tokens=20, async_scheduling=True) as llm:
        yield llm


def mixed_prompts() -> list[list[int]]:
    dice = random.Random(11)
    return [dice.choices(range(3, 400), k=length) for length in (1, 8, 15, 24, 33, 40, 57, 64)]


def sampled(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_OUTPUT, "ignore_eos": True, "seed": 5, **options})


def one(llm: LLM, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
    return llm.generate([prompt], params)[0]  # type: ignore[list-item]


# -- a request's tokens are its own --------------------------------------------------------------------------------
EVERYTHING: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 1.0},
    "min_p": {"min_p": 0.05, "top_k": 50},
    "bias": {"logit_bias": {20: 6.0, 21: 6.0, 22: -100.0}},
    "allowed": {"allowed_token_ids": list(range(30, 90)), "top_p": 0.9},
    "bad words": {"bad_words": ["the", "e", "bl"], "logit_bias": {token_of("e"): 9.0, token_of("b"): 9.0}},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "min_tokens": {"min_tokens": 9, "ignore_eos": False, "logit_bias": {2: 30.0}},
    "regex": {"structured_outputs": {"regex": "[a-f ]{40,60}"}, "repetition_penalty": 1.1},
    "schema": {
        "structured_outputs": {"json": {"type": "array", "items": {"enum": ["a", "b", 1]}}},
        "ignore_eos": False,
        "presence_penalty": 0.5,
        "n": 2,
    },
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=list(EVERYTHING))
def test_tokens_do_not_depend_on_batch_chunks_or_preemption(
    options: dict[str, Any], llm: LLM, cramped: LLM, asynchronous: LLM
) -> None:
    prompts, params = mixed_prompts(), SamplingParams.from_options({"max_tokens": NUM_OUTPUT, "seed": 5, **options})
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert tokens_of(llm.generate(prompts, params)) == tokens_of(alone)
    for engine in (cramped, asynchronous):
        together = engine.generate(prompts, params)
        assert tokens_of(together) == tokens_of(alone)
        assert [o.outputs[0].text for o in together] == [o.outputs[0].text for o in alone]
        for got, expected in zip(together, alone, strict=True):
            assert_close(got.outputs[0].logprobs, expected.outputs[0].logprobs)
            assert_close(got.prompt_logprobs, expected.prompt_logprobs)


def test_the_cramped_engines_do_preempt(cramped: LLM, asynchronous: LLM) -> None:
    for engine in (cramped, asynchronous):
        engine.generate(mixed_prompts(), sampled())
        assert engine.llm_engine._stats.num_preemptions > 0


def assert_close(got: Sequence[Any] | None, expected: Sequence[Any] | None) -> None:
    """The same tokens and ranks at each position, log-probabilities within rounding."""
    if got is None or expected is None:
        assert got == expected
        return
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert a == b
            continue
        assert list(a) == list(b)
        assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-4)


# -- single options ------------------------------------------------------------------------------------------------
def test_frequency_penalty_spreads_what_greedy_repeats(llm: LLM) -> None:
    plain = one(llm, [5] * 20, sampled(temperature=0.0, max_tokens=60, logit_bias={9: 15.0})).outputs[0].token_ids
    spread = one(llm, [5] * 20, sampled(temperature=0.0, max_tokens=60, logit_bias={9: 15.0}, frequency_penalty=2.0))
    assert plain.count(9) > 40
    assert spread.outputs[0].token_ids.count(9) < 20


def test_bias_and_allowed_tokens_decide(llm: LLM) -> None:
    assert one(llm, "the", sampled(logit_bias={77: 100.0})).outputs[0].token_ids == [77] * NUM_OUTPUT
    ids = one(llm, "the", sampled(allowed_token_ids=[40, 50, 60])).outputs[0].token_ids
    assert set(ids) <= {40, 50, 60}
    assert len(set(ids)) > 1


def test_bad_words_do_not_appear_with_or_without_a_space(llm: LLM) -> None:
    likely = {token_of(text): 12.0 for text in ("the", " the", "bl", "ock", " bl", "ocks") if len(ids_of(text)) == 1}
    free = one(llm, "a", sampled(max_tokens=100, logit_bias=likely)).outputs[0].text
    assert "the" in free
    bound = one(llm, "a", sampled(max_tokens=100, logit_bias=likely, bad_words=["the"])).outputs[0]
    (bare,), (spaced,) = ids_of("the"), ids_of(" the")
    assert not {bare, spaced} & set(bound.token_ids)


def test_bad_words_of_several_tokens_lose_only_their_end(llm: LLM) -> None:
    x, y = token_of("x"), token_of("y")
    assert ids_of("xy") == [x, y]
    even = {x: 30.0, y: 30.0}
    free = one(llm, "a", sampled(max_tokens=80, logit_bias=even)).outputs[0].text
    bound = one(llm, "a", sampled(max_tokens=80, logit_bias=even, bad_words=["xy"])).outputs[0].text
    assert "xy" in free
    assert "xy" not in bound
    assert {"x", "y"} <= set(bound) or set(bound) == {"x"}


def ids_of(text: str) -> list[int]:
    return make_backend().encode(text).ids


def test_stop_strings_and_streams_cut_text_tokens_and_logprobs_alike(llm: LLM) -> None:
    whole = one(llm, "the blocks", sampled(max_tokens=40, logprobs=1)).outputs[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = one(llm, "the blocks", sampled(max_tokens=40, logprobs=1, stop=stop)).outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[: whole.text.index(stop)], "stop", stop)
    assert cut.logprobs is not None
    assert len(cut.logprobs) == len(cut.token_ids) < 40
    *_, streamed = llm.generate_stream("the blocks", sampled(max_tokens=40, logprobs=1, stop=stop))
    assert streamed.outputs[0] == cut


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"logit_bias": {420: 1.0}}, "logit_bias has token id 420; it must be from 0 to 419"),
        ({"allowed_token_ids": [5, 1000]}, "allowed_token_ids has token id 1000"),
        ({"allowed_token_ids": [2], "min_tokens": 3}, "all of allowed_token_ids end the generation"),
        (
            {"structured_outputs": {"json": '{"type": "nonsense"}'}},
            "structured_outputs.json cannot be honoured.*nonsense",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json is not valid"),
        ({"structured_outputs": {"json": "[1]"}}, "a JSON schema is an object"),
        ({"structured_outputs": {"json": {"not": {}}}}, "cannot be honoured: Unimplemented keys"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex cannot be honoured.*unclosed group"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "look-around"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
    ],
)
def test_what_the_model_cannot_do_is_refused(llm: LLM, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"(?s){complaint}"):
        llm.generate("the", SamplingParams.from_options(options))


def test_a_schema_nested_too_deeply_is_refused(llm: LLM) -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"anyOf": [schema]}
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        llm.generate("the", SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)))


def test_without_a_tokenizer_options_about_text_are_refused(text_model: Path) -> None:
    with make_llm(text_model, skip_tokenizer_init=True) as llm:
        for options in ({"bad_words": "x"}, {"structured_outputs": {"regex": "a"}}):
            with pytest.raises(InvalidRequestError, match="without a tokenizer"):
                llm.generate([5, 6], SamplingParams.from_options(options))
        output = llm.generate([5, 6], sampled(logprobs=1, repetition_penalty=1.5))[0].outputs[0]
        assert output.logprobs is not None
        assert {entry.decoded_token for position in output.logprobs for entry in position.values()} == {None}


# -- log-probabilities ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [16, 64], ids=["in chunks", "at once"])
@pytest.mark.parametrize("name", ["qwen3-gqa8-bias", "qwen2-yarn-gqa3"])
def test_logprobs_are_those_of_transformers(
    name: str, budget: int, checkpoint: Callable[..., Path], hf_model: Callable[..., PreTrainedModel]
) -> None:
    prompt = random.Random(name).choices(range(90), k=41)
    params = SamplingParams(seed=1, max_tokens=12, logprobs=5, prompt_logprobs=3, temperature=0.7, ignore_eos=True)
    with make_llm(checkpoint(name), skip_tokenizer_init=True, max_num_batched_tokens=budget, block_size=16) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))  # what it caches must not be used for the prompt's
        output = llm.generate([prompt], params)[0]
    sequence = output.outputs[0]
    ids = torch.tensor([prompt + sequence.token_ids])
    with torch.inference_mode():
        expected = torch.log_softmax(hf_model(name)(ids).logits[0].float(), dim=-1)
    assert output.prompt_logprobs is not None
    assert sequence.logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert (len(output.prompt_logprobs), len(sequence.logprobs)) == (len(prompt), 12)
    assert output.num_cached_tokens == 0
    positions = [*output.prompt_logprobs[1:], *sequence.logprobs]
    for position, (reported, row) in enumerate(zip(positions, expected, strict=False), 1):
        assert reported is not None
        number = 3 if position < len(prompt) else 5
        check_position(reported, row, int(ids[0, position]), number)
    total = sum(position[token].logprob for token, position in zip(sequence.token_ids, sequence.logprobs, strict=True))
    assert sequence.cumulative_logprob == pytest.approx(total)


def check_position(reported: dict[int, Logprob], expected: torch.Tensor, token: int, number: int) -> None:
    assert next(iter(reported)) == token
    assert len(reported) - number in (0, 1)
    assert {token, *expected.topk(number).indices.tolist()} == set(reported)
    for token_id, entry in reported.items():
        assert entry.logprob == pytest.approx(expected[token_id].item(), abs=2e-4)
        assert entry.rank == int((expected >= expected[token_id]).sum())


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    output = one(llm, "東京 blocks", sampled(logprobs=2, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    texts = [next(iter(position.values())).decoded_token for position in output.prompt_logprobs if position]
    pieces = [make_backend().decode([token]) for token in output.prompt_token_ids[1:]]
    assert texts == pieces
    assert [len(position) for position in output.prompt_logprobs if position] == [1] * len(texts)


def test_options_nobody_gave_report_nothing(llm: LLM) -> None:
    output = one(llm, "the", sampled())
    assert (output.prompt_logprobs, output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None,) * 3


def test_a_request_for_prompt_logprobs_reads_neither_cache_nor_store() -> None:
    scheduler = make_scheduler(
        connector=FakeConnector(hits={"asks": (16, False, 0, "ok"), "plain": (16, False, 0, "ok")})
    )
    prompt = list(range(20))
    scheduler.add_request(make_request("asks", prompt, prompt_logprobs=0))
    assert scheduler.schedule().num_scheduled_tokens == {"asks": 20}
    connector = scheduler.connector
    assert isinstance(connector, FakeConnector)
    assert connector.asked == []
    # The other finds what the first computes.
    scheduler.add_request(make_request("plain", prompt))
    assert scheduler.kv_cache_manager.get_computed_blocks(scheduler.requests["plain"])[1] == 16
    assert scheduler.kv_cache_manager.get_computed_blocks(scheduler.requests["asks"])[1] == 0


# -- several sequences ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [3, 8, 16, 17, 40])
def test_n_sequences_are_those_of_n_requests_with_consecutive_seeds(llm: LLM, cramped: LLM, length: int) -> None:
    prompt = random.Random(length).choices(range(3, 400), k=length)
    expected = [one(llm, prompt, sampled(seed=5 + i)).outputs[0].token_ids for i in range(4)]
    for engine in (llm, cramped):
        assert engine.reset_prefix_cache()
        output = one(engine, prompt, sampled(n=4))
        assert tokens_of([output]) == [expected]
        assert [sequence.index for sequence in output.outputs] == [0, 1, 2, 3]
        assert output.num_cached_tokens == 0


def test_sequences_of_a_prompt_share_its_blocks(llm: LLM) -> None:
    assert llm.reset_prefix_cache()
    before = llm.get_cache_stats()
    llm.generate([list(range(3, 43))], sampled(n=4))
    after = llm.get_cache_stats()
    assert after.hits - before.hits == 3 * 32  # 4 full blocks of 8 lie before the last token, for all but the first
    assert (after.queries - before.queries) == 4 * 40


def test_sequences_stream_together_and_end_apart(llm: LLM) -> None:
    params = sampled(n=3, ignore_eos=False, logit_bias={2: 3.0}, max_tokens=12, logprobs=0, prompt_logprobs=1)
    whole = one(llm, "the blocks", params)
    states = list(llm.generate_stream("the blocks", params))
    assert all(len(state.outputs) == 3 for state in states)
    assert states[-1].outputs == whole.outputs
    assert [state.finished for state in states] == [False] * (len(states) - 1) + [True]
    assert all(
        now.outputs[i].text.startswith(then.outputs[i].text)
        for then, now in itertools.pairwise(states)
        for i in range(3)
    )
    assert whole.prompt_logprobs is not None
    assert len({sequence.finish_reason for sequence in whole.outputs}) >= 1


def test_closing_a_stream_ends_all_its_sequences(llm: LLM) -> None:
    stream = llm.generate_stream([[5] * 20, [6] * 20], sampled(n=3, max_tokens=100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    llm.get_cache_stats()  # a step, in which the core tells the runner
    assert llm.reset_prefix_cache()  # refused while a block is in use


def test_greedy_sequences_are_all_the_same(llm: LLM) -> None:
    (first, second) = one(llm, "the", sampled(n=2, temperature=0.0)).outputs
    assert first.token_ids == second.token_ids


def test_the_vocabulary_is_larger_than_the_tokenizers() -> None:
    assert make_backend().get_vocab_size() < TEXT_SHAPE.vocab
