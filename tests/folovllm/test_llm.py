import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.folovllm.serving_fixtures import FakeCore, write_front_end_files

from folovllm.engine.core_client import InprocClient
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.processor import Limits, Processor
from folovllm.entrypoints.llm import LLM
from folovllm.errors import ConfigError, InvalidRequestError, ModelLoadError
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.model_files import read_model_facts
from folovllm.transformers_utils.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def llm(small_model: Path) -> Iterator[LLM]:
    with LLM(str(small_model), num_kv_blocks=64, max_model_len=512, num_threads=1) as llm:
        yield llm


@pytest.fixture
def echo(tmp_path: Path) -> tuple[LLM, FakeCore]:
    """An LLM whose model repeats its prompt."""
    core = FakeCore()
    directory = write_front_end_files(tmp_path)
    processor = Processor(Tokenizer.from_checkpoint(directory), Limits(512, 1024), read_model_facts(directory))
    llm = object.__new__(LLM)
    llm._engine = LLMEngine(InprocClient(core), processor)  # type: ignore[arg-type]
    return llm, core


def test_results_come_in_the_order_of_the_prompts_whatever_ends_first(llm: LLM) -> None:
    prompts = ["the first one", [5, 6, 7], "the third"]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 3, 1)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == ["the first one", None, "the third"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 3, 1]
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    alone = [llm.generate(prompt, option)[0].outputs[0] for prompt, option in zip(prompts, params, strict=True)]
    assert [output.outputs[0] for output in outputs] == alone


def test_one_prompt_of_token_ids_is_not_many_prompts(llm: LLM) -> None:
    assert len(llm.generate([5, 6, 7], GREEDY)) == 1
    assert len(llm.generate([[5, 6, 7], [8]], GREEDY)) == 2
    assert llm.generate([], GREEDY) == []


def test_stream_grows_to_what_generate_returns(llm: LLM) -> None:
    whole = llm.generate("when two prompts", GREEDY)[0].outputs[0]
    states = list(llm.generate_stream("when two prompts", GREEDY))
    assert [len(state.outputs[0].token_ids) for state in states] == [1, 2, 3, 4, 5, 6]
    assert all(b.outputs[0].text.startswith(a.outputs[0].text) for a, b in itertools.pairwise(states))
    assert states[-1].outputs[0] == whole
    assert [state.finished for state in states] == [False] * 5 + [True]


def test_chat_uses_the_template_and_hits_the_prefix_cache(llm: LLM) -> None:
    messages = [{"role": "user", "content": "say something long enough for a block, please"}]
    assert llm.reset_prefix_cache()
    first, second = llm.chat(messages, GREEDY)[0], llm.chat([messages], GREEDY)[0]
    assert first.prompt is not None
    assert first.prompt.startswith("<|im_start|>user\nsay something")
    assert first.prompt.endswith("<|im_start|>assistant\n")
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16 * ((len(first.prompt_token_ids) - 1) // 16))
    assert first.outputs == second.outputs


def test_prompts_share_blocks_only_within_a_salt(llm: LLM) -> None:
    assert llm.reset_prefix_cache()
    prompt = [9] * 40

    def cached(salt: str | None) -> int:
        return llm.generate(prompt, GREEDY, cache_salt=salt)[0].num_cached_tokens

    assert [cached(salt) for salt in (None, "a", "b", "a", None)] == [0, 0, 0, 32, 32]
    *_, streamed = llm.generate_stream(prompt, GREEDY, cache_salt="c")
    assert streamed.num_cached_tokens == 0
    messages = [{"role": "user", "content": "say something long enough for a block, please"}]
    chats = [llm.chat(messages, GREEDY, cache_salt=salt)[0].num_cached_tokens for salt in ("a", "b", "a")]
    assert chats[:2] == [0, 0]
    assert chats[2] > 0
    with pytest.raises(InvalidRequestError, match="cache_salt='' is not allowed"):
        llm.generate(prompt, GREEDY, cache_salt="")


def test_cache_stats_follow_hits_and_reset(llm: LLM) -> None:
    assert llm.reset_prefix_cache()
    before = llm.get_cache_stats()
    assert before.cached_blocks == 0
    llm.generate([[7] * 33, [7] * 33], GREEDY)
    llm.generate([7] * 33, GREEDY)
    after = llm.get_cache_stats()
    assert after.cached_blocks >= 2
    assert after.queries - before.queries == 99
    assert after.hits - before.hits >= 32
    assert 0 < after.hit_rate <= 1


def test_metrics_of_a_request_are_in_order(llm: LLM) -> None:
    metrics = llm.generate("when", GREEDY)[0].metrics
    assert metrics.first_token_time is not None
    assert metrics.last_token_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.last_token_time


def test_one_bad_prompt_stops_all_before_anything_runs(echo: tuple[LLM, FakeCore]) -> None:
    llm, core = echo
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(InvalidRequestError, match="2 sampling params for 1 prompts"):
        llm.generate("fine", [GREEDY, GREEDY])
    assert not core.has_work


def test_stop_string_ends_the_request_here_and_in_the_core(echo: tuple[LLM, FakeCore]) -> None:
    llm, core = echo
    output = llm.generate("one two STOP three", SamplingParams(max_tokens=40, stop=("ST",)))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("one two ", "stop", "ST")
    assert len(core.aborted) == 1
    assert not core.has_work


def test_eos_token_is_kept_in_the_tokens_and_not_in_the_text(echo: tuple[LLM, FakeCore]) -> None:
    llm, _ = echo
    output = llm.generate("one two<|im_end|>three", SamplingParams(max_tokens=40, skip_special_tokens=False))[
        0
    ].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("one two", "stop", None)
    assert output.token_ids[-1] == 2


def test_closing_a_stream_aborts_the_request(echo: tuple[LLM, FakeCore]) -> None:
    llm, core = echo
    stream = llm.generate_stream("one two three", SamplingParams(max_tokens=40))
    next(stream)
    stream.close()
    assert len(core.aborted) == 1
    assert not core.has_work


def test_generate_in_the_middle_of_a_stream_loses_nothing(echo: tuple[LLM, FakeCore]) -> None:
    llm, _ = echo
    stream = llm.generate_stream("one two three", SamplingParams(max_tokens=12))
    next(stream)
    assert llm.generate("blocks", SamplingParams(max_tokens=12))[0].finished
    *_, last = stream
    assert len(last.outputs[0].token_ids) == 12


def test_prompt_longer_than_the_pool_is_told_so(small_model: Path) -> None:
    with LLM(str(small_model), num_kv_blocks=5, num_threads=1) as llm:
        assert llm.generate([[5] * 63], GREEDY)[0].outputs[0].finish_reason == "length"
        with pytest.raises(InvalidRequestError, match="at most 63 fit, because the KV pool holds 64 tokens"):
            llm.generate([[5] * 64], GREEDY)


def test_mistakes_in_options_are_named(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(str(small_model), max_model_length=5)
    with pytest.raises(ConfigError, match="dtype='int3' is not allowed"):
        LLM(str(small_model), dtype="int3")
    with pytest.raises(ModelLoadError, match="not a directory"):
        LLM(str(tmp_path / "nothing-here"))


def test_use_after_shutdown_is_an_error(echo: tuple[LLM, FakeCore]) -> None:
    llm, core = echo
    llm.shutdown()
    llm.shutdown()
    assert core.is_shut_down
    with pytest.raises(InvalidRequestError, match="shut down"):
        llm.generate("x")


def test_without_tokenizer_token_ids_in_token_ids_out(small_model: Path) -> None:
    with LLM(str(small_model), num_kv_blocks=16, num_threads=1, skip_tokenizer_init=True) as llm:
        output = llm.generate([5, 6, 7], GREEDY)[0].outputs[0]
        assert (len(output.token_ids), output.text) == (6, "")
        with pytest.raises(InvalidRequestError, match="without a tokenizer"):
            llm.generate("text", GREEDY)
