from pathlib import Path

import pytest
from tests.folovllm.serving_fixtures import EOS, write_front_end_files
from transformers import AutoTokenizer

from folovllm.engine.processor import Limits, Processor, PromptTooLongError
from folovllm.errors import InvalidRequestError, ModelLoadError
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.model_files import read_model_facts
from folovllm.transformers_utils.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_front_end_files(tmp_path_factory.mktemp("model"))


def make_processor(directory: Path, context_len: int = 32, pool_tokens: int = 64) -> Processor:
    tokenizer = Tokenizer.from_checkpoint(directory)
    return Processor(tokenizer, Limits(context_len, pool_tokens), read_model_facts(directory))


def test_text_and_its_token_ids_make_the_same_request(directory: Path) -> None:
    processor = make_processor(directory)
    ids = processor.tokenize("the blocks")
    assert processor.tokenize(ids) == ids
    assert processor.tokenizer is not None
    assert processor.tokenizer.decode(ids) == "the blocks"


def test_eos_of_tokenizer_and_configuration_are_joined(directory: Path, tmp_path: Path) -> None:
    write_front_end_files(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.6, "top_k": 20}')
    processor = make_processor(tmp_path)
    assert processor.tokenizer is not None
    assert processor.tokenizer.backend.token_to_id(EOS) == 2
    assert processor.eos_token_ids == (2, 0)
    assert processor.facts.default_sampling == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, -1], "token id -1; it must be from 0 to"),
        ([1, 10**6], "token id 1000000; it must be from 0 to"),
        ([1, True], "holds True; token ids must be integers"),
        ([5] * 32, "has 32 tokens; at most 31 fit, because the maximum context length is 32"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_bad_prompts_are_named(directory: Path, prompt: str | list[int], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        make_processor(directory).tokenize(prompt)


def test_longest_prompt_leaves_one_token(directory: Path) -> None:
    processor = make_processor(directory)
    ids = processor.tokenize([5] * 31)
    assert processor.make_request(ids, SamplingParams(max_tokens=None)).sampling_params.max_tokens == 1


def test_prompt_must_fit_the_pool(directory: Path) -> None:
    processor = make_processor(directory, context_len=100, pool_tokens=48)
    assert len(processor.tokenize([5] * 47)) == 47
    with pytest.raises(PromptTooLongError, match="at most 47 fit, because the KV pool holds 48 tokens"):
        processor.tokenize([5] * 48)


@pytest.mark.parametrize(("asked", "given"), [(None, 22), (5, 5), (22, 22), (500, 22)])
def test_max_tokens_is_cut_to_the_context(directory: Path, asked: int | None, given: int) -> None:
    processor = make_processor(directory)
    request = processor.make_request([5] * 10, SamplingParams(max_tokens=asked))
    assert request.sampling_params.max_tokens == given


def test_chat_renders_the_template_once(directory: Path) -> None:
    processor = make_processor(directory)
    prompt = processor.render_chat([{"role": "user", "content": "hi"}])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        processor.render_chat([])


def test_without_a_tokenizer_only_token_ids_are_served(directory: Path) -> None:
    processor = Processor(None, Limits(32, 64), read_model_facts(directory))
    assert processor.tokenize([1, 2]) == [1, 2]
    for refused in (
        lambda: processor.tokenize("text"),
        lambda: processor.render_chat([{"role": "user", "content": "hi"}]),
        lambda: processor.make_request([1], SamplingParams(stop=("x",))),
    ):
        with pytest.raises(InvalidRequestError, match="without a tokenizer"):
            refused()


def test_salt_must_not_be_empty(directory: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        make_processor(directory).make_request([1], SamplingParams(), cache_salt="")


def test_chat_template_may_come_in_its_own_file(tmp_path: Path) -> None:
    write_front_end_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{{ eos_token }}{% endfor %}{{ extra }}"
    )
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<é>"}], extra="!")
    assert text == '{"role": "user", "content": "<é>"}<|im_end|>!'
    with pytest.raises(InvalidRequestError, match="no such role"):
        tokenizer.apply_chat_template([{"role": "bad"}])


def test_text_tokens_and_chat_are_those_of_transformers(small_model: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(small_model), Tokenizer.from_checkpoint(small_model)
    messages = [{"role": "system", "content": "brief <b>"}, {"role": "user", "content": "Größe 東京 🎉?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == prompt
    ids = theirs.encode(prompt)
    assert ours.encode(prompt) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_token_ids == {0, 1, 2}


def test_chat_template_cannot_reach_the_machine(tmp_path: Path) -> None:
    write_front_end_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequestError, match="unsafe"):
        Tokenizer.from_checkpoint(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])


def test_broken_checkpoint_files_are_named(tmp_path: Path) -> None:
    write_front_end_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        read_model_facts(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_checkpoint(tmp_path)


def test_priority_needs_the_policy_that_heeds_it(directory: Path) -> None:
    processor = make_processor(directory)
    assert processor.make_request([1], SamplingParams()).priority == 0
    with pytest.raises(InvalidRequestError, match=r"priority=-3 .* scheduling_policy='priority'"):
        processor.make_request([1], SamplingParams(), priority=-3)
    processor.scheduling_policy = "priority"
    assert processor.make_request([1], SamplingParams(), priority=-3).priority == -3
