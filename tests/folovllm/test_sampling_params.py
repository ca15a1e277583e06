"""Every option is checked where it is given, and the message names it."""

import msgspec
import pytest

from folovllm.errors import InvalidRequestError
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n", 0),
        ("n", 5000),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("bad_words", ("fine", " ")),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (1, -1)),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"{option}=.* is not allowed"):
        SamplingParams(**{option: value})
    if not isinstance(value, dict):
        with pytest.raises(InvalidRequestError, match=option):
            SamplingParams.from_options({option: value})


def test_options_of_a_json_body_are_converted() -> None:
    params = SamplingParams.from_options(
        {
            "n": 3,
            "logit_bias": {"5": 1, "7": -2.5},
            "bad_words": "no",
            "stop": "end",
            "allowed_token_ids": [1, 2],
            "logprobs": 0,
            "temperature": 1,
        }
    )
    assert params.logit_bias == {5: 1.0, 7: -2.5}
    assert (params.n, params.bad_words, params.stop, params.allowed_token_ids) == (3, ("no",), ("end",), (1, 2))
    assert SamplingParams(stop="end", bad_words="no").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]) == SamplingParams(stop=("a", "b"), stop_token_ids=(1,))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"presence_penality": 1}, "did you mean 'presence_penalty'"),
        ({"structured_outputs": {}}, "none of its kinds; it must have exactly one of json, regex"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "json and regex; it must have exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regexp": "a"}}, "regexp"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "whitespace_pattern=' ' is not allowed"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [1]}, "cannot be used together"),
    ],
)
def test_mistakes_of_a_json_body_are_named(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        SamplingParams.from_options(options)


def test_options_survive_the_way_to_the_core() -> None:
    params = SamplingParams(
        n=2, logit_bias={3: 1.5}, bad_words=("x",), allowed_token_ids=None, logprobs=4, repetition_penalty=1.3
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    wanted = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wanted), type=SamplingParams) == wanted
