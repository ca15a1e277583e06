"""What a request says its text must look like, it looks like: on a model with random weights, which means no help."""

import json
import random
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tests.folovllm.json_schemas import random_object, random_schema
from tests.folovllm.sampling_fixtures import EOS_ID, TEXT_SHAPE, make_llm, make_text_model
from tests.folovllm.serving_fixtures import make_backend
from tokenizers import Tokenizer

from folovllm.engine.grammar import compile_grammar
from folovllm.entrypoints.llm import LLM
from folovllm.outputs import CompletionOutput
from folovllm.sample.logits_processor.structured import GrammarCompiler
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams

NUM_SCHEMAS = 200


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with make_llm(text_model, max_num_seqs=32) as llm:
        yield llm


def complete(llm: LLM, structured: dict[str, Any], **options: Any) -> list[CompletionOutput]:
    defaults = {"max_tokens": 200, "seed": 3}
    params = SamplingParams.from_options({**defaults, **options, "structured_outputs": structured})
    return llm.generate("the blocks", params)[0].outputs


# -- JSON ----------------------------------------------------------------------------------------------------------
def test_outputs_are_valid_for_200_random_schemas(llm: LLM) -> None:
    dice = random.Random(2024)
    schemas = [random_object(dice) if i % 2 else random_schema(dice) for i in range(NUM_SCHEMAS)]
    # Allowed without end, a model with random weights would write it without end.
    whitespace = ({"whitespace_pattern": "[ \n]?"}, {"disable_any_whitespace": True})
    params = [
        SamplingParams(
            max_tokens=250,
            seed=i,
            structured_outputs=StructuredOutputsParams(json=schema, **whitespace[i % 2]),
            temperature=(1.0, 0.0, 0.7, 1.3, 1.0)[i % 5],
        )
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate([f"prompt {i}" for i in range(NUM_SCHEMAS)], params)
    for schema, output in zip(schemas, outputs, strict=True):
        text = output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop", (schema, text)
        try:
            jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"{text!r} is not valid for {json.dumps(schema)}: {error}")


def test_a_json_object_is_one(llm: LLM) -> None:
    outputs = complete(llm, {"json_object": True, "disable_any_whitespace": True}, n=8, logit_bias={93: 3.0})
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_whitespace_and_further_properties_are_as_told(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}
    tight = {"disable_additional_properties": True, "disable_any_whitespace": True}
    assert [o.text for o in complete(llm, {"json": schema, **tight}, n=3)] == ['{"a":1,"b":2}'] * 3
    spaced = {"disable_additional_properties": True, "whitespace_pattern": "  "}
    (output,) = complete(llm, {"json": json.dumps(schema), **spaced})
    assert json.loads(output.text) == {"a": 1, "b": 2}
    assert "  " in output.text
    assert not re.search(r"[\n\t]|   ", output.text)


# -- other kinds ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["[a-c]{3,5}x", r"\d{3}-\d{4}", "(yes|no)( maybe)?", "[а-яё東京]{4}!", "a{30}"])
def test_a_text_matches_its_regular_expression(llm: LLM, pattern: str) -> None:
    for output in complete(llm, {"regex": pattern}, n=4):
        assert output.finish_reason == "stop"
        assert re.fullmatch(pattern, output.text)


def test_a_text_is_one_of_the_choices(llm: LLM) -> None:
    choices = ["red", "green", 'quo"te', "東京 🎉", "a\\b", "new\nline"]
    texts = [output.text for output in complete(llm, {"choice": choices}, n=20)]
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1


def test_a_text_follows_its_grammar_in_either_notation(llm: LLM) -> None:
    lark = 'start: "(" pair ("," pair){1,3} ")"\npair: /[a-z]{2}/ "=" /[0-9]{1,3}/'
    gbnf = 'root ::= "(" pair ("," pair) ")"\npair ::= [a-z] [a-z] "=" [0-9]'
    for grammar in (lark, gbnf):
        for output in complete(llm, {"grammar": grammar}, n=3):
            assert re.fullmatch(r"\([a-z]{2}=\d{1,3}(,[a-z]{2}=\d{1,3}){1,3}\)", output.text)


# -- how it ends, and other options --------------------------------------------------------------------------------
def test_the_grammar_goes_before_min_tokens_and_bad_words(llm: LLM) -> None:
    (output,) = complete(llm, {"choice": ["red"]}, min_tokens=50, bad_words=["red", "r", "e", "d"])
    assert (output.text, output.finish_reason, output.token_ids[-1]) == ("red", "stop", EOS_ID)
    # Where there is a choice they are heeded.
    (output,) = complete(llm, {"regex": "[ab]{1,20}"}, min_tokens=12, bad_words=["a"])
    assert re.fullmatch("b{11,20}", output.text)


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"ignore_eos": True, "stop": ["zz"]}])
def test_a_text_ends_with_its_grammar_without_an_end_of_sequence(llm: LLM, options: dict[str, Any]) -> None:
    (output,) = complete(llm, {"regex": "[ab]{5}"}, **options)
    assert (len(output.text), output.finish_reason, output.stop_reason) == (5, "stop", None)
    assert EOS_ID not in output.token_ids
    assert "".join(make_backend().decode([token]) for token in output.token_ids) == output.text


def test_a_stop_string_and_the_length_still_end_it(llm: LLM) -> None:
    (output,) = complete(llm, {"regex": "[ab]{30}c[ab]*"}, stop=["c"])
    assert (output.finish_reason, output.stop_reason, len(output.text)) == ("stop", "c", 30)
    (output,) = complete(llm, {"regex": "[ab]{300}"}, max_tokens=20)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 20)


def test_others_in_the_batch_are_free(llm: LLM) -> None:
    free = SamplingParams(seed=9, max_tokens=30, ignore_eos=True)
    bound = SamplingParams(seed=9, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[ab]{30}"))
    alone = llm.generate("the", free)[0].outputs[0].text
    outputs = llm.generate(["the", "the", "the"], [free, bound, free])
    assert [outputs[0].outputs[0].text, outputs[2].outputs[0].text] == [alone, alone]
    assert re.fullmatch("[ab]{30}", outputs[1].outputs[0].text)


def test_streamed_text_is_the_whole_text(llm: LLM) -> None:
    structured = StructuredOutputsParams(json={"enum": ["東京タワー", "größe"]})
    params = SamplingParams(seed=1, max_tokens=60, structured_outputs=structured)
    whole = llm.generate("the", params)[0].outputs[0]
    *_, last = llm.generate_stream("the", params)
    assert last.outputs[0] == whole
    assert json.loads(whole.text) in ("東京タワー", "größe")


# -- the matcher ---------------------------------------------------------------------------------------------------
def make_compiler(loads: list[str] | None = None) -> GrammarCompiler:
    def load() -> Tokenizer:
        if loads is not None:
            loads.append(threading.current_thread().name)
        return Tokenizer.from_str(make_backend().to_str())

    return GrammarCompiler(load, TEXT_SHAPE.vocab)


def allowed(matcher: Any) -> set[str | None]:
    backend = make_backend()
    return {backend.id_to_token(int(i)) for i in np.flatnonzero(matcher.allowed_tokens())}


def follow(matcher: Any, text: str) -> Sequence[int]:
    ids: list[int] = make_backend().encode(text).ids
    for token in ids:
        matcher.append(token)
    return ids


def test_the_tokenizer_is_loaded_once_and_only_for_a_grammar() -> None:
    loads: list[str] = []
    compiler = make_compiler(loads)
    assert not loads
    grammar = compile_grammar(StructuredOutputsParams(regex="ab?"))
    first, second = compiler.make_matcher(grammar, (EOS_ID,)), compiler.make_matcher(grammar, (EOS_ID,))
    compiler.make_matcher(compile_grammar(StructuredOutputsParams(regex="c")), (EOS_ID,))
    assert len(loads) == 1
    follow(first, "a")
    assert allowed(second) == {"a"}


def test_end_of_sequence_is_allowed_where_the_text_may_end() -> None:
    grammar = compile_grammar(StructuredOutputsParams(regex="ab?"))
    matcher = make_compiler().make_matcher(grammar, (EOS_ID, 0))
    assert allowed(matcher) == {"a"}
    follow(matcher, "a")
    assert allowed(matcher) == {"b", "<|im_end|>", "<|endoftext|>"}
    follow(matcher, "b")
    assert allowed(matcher) == {"<|im_end|>", "<|endoftext|>"}
    assert matcher.end is None
    matcher.append(0)
    assert matcher.end == "stop"
    assert matcher.allowed_tokens() is None


def test_without_end_of_sequence_it_ends_by_itself() -> None:
    matcher = make_compiler().make_matcher(compile_grammar(StructuredOutputsParams(regex="ab?")), ())
    follow(matcher, "a")
    assert allowed(matcher) == {"b"}
    follow(matcher, "b")
    assert matcher.end == "stop"


def test_it_goes_on_from_any_other_output() -> None:
    matcher = make_compiler().make_matcher(compile_grammar(StructuredOutputsParams(regex="ab{3}c")), (EOS_ID,))
    ids = follow(matcher, "abbb")
    assert allowed(matcher) == {"c"}
    matcher.sync(ids[:2])
    assert allowed(matcher) == {"b"}
    matcher.sync(ids)
    assert allowed(matcher) == {"c"}
    matcher.append(ids[0])
    assert matcher.end == "error"
    matcher.sync([])
    assert (matcher.end, allowed(matcher)) == (None, {"a"})


def test_a_tokenizer_that_cannot_be_used_fails_the_request_alone() -> None:
    def broken() -> Tokenizer:
        raise ValueError("no such tokenizer")

    matcher = GrammarCompiler(broken, 400).make_matcher(compile_grammar(StructuredOutputsParams(regex="a")), (EOS_ID,))
    assert matcher.allowed_tokens() is None
    assert matcher.end == "error"
