"""Calls in the text of an answer, however the text arrives."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.entrypoints.openai.tool_parsers import TOOL_PARSERS, ParsedDelta, ToolParser, choose_tool_parser
from folovllm.entrypoints.openai.tool_parsers.forced import NamedToolParser, RequiredToolParser, required_schema
from folovllm.entrypoints.openai.tool_parsers.hermes import HermesToolParser
from folovllm.errors import ConfigError

Calls = list[tuple[str, str]]


def read(parser: ToolParser, pieces: list[str]) -> tuple[str, Calls]:
    """Text and calls of an answer, put together from the deltas as a client does."""
    parsed = ParsedDelta()
    for piece in pieces:
        parsed.merge(parser.feed(piece))
    parsed.merge(parser.finish())
    calls: Calls = []
    for delta in parsed.tool_calls:
        if delta.id is not None:
            assert delta.index == len(calls)
            assert delta.name is not None
            calls.append((delta.name, ""))
        assert delta.index == len(calls) - 1
        name, arguments = calls[-1]
        calls[-1] = (name, arguments + delta.arguments)
    assert parser.num_calls == len(calls)
    return parsed.content, calls


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


HERMES: list[tuple[str, str, Calls]] = [
    ("no call at all \n", "no call at all \n", []),
    (call("f", '{"x": 1}'), "", [("f", '{"x": 1}')]),
    ("Let me see.\n" + call("f", "{}") + "\n" + call("g", '{"a": [1, {"b": "c"}]}'), "Let me see.",
     [("f", "{}"), ("g", '{"a": [1, {"b": "c"}]}')]),
    (call("f", '{"x": "</tool_call> \\" } <tool_call>"}') + " done", "done",
     [("f", '{"x": "</tool_call> \\" } <tool_call>"}')]),
    ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f", "id": 7, "parameters": {}}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "größe", "arguments": {"x": "東京"}}</tool_call>', "", [("größe", '{"x": "東京"}')]),
    # The end was forgotten, or is malformed:
    (call("f", "{}").removesuffix("</tool_call>") + call("g", "{}"), "", [("f", "{}"), ("g", "{}")]),
    (call("f", "{}").removesuffix("</tool_call>"), "", [("f", "{}")]),
    (call("f", "{}").removesuffix("</tool_call>") + "and text", "and text", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call> on', "on", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {"x": ]}}</tool_call>', "", [("f", '{"x": ')]),
    ('<tool_call>{"name": "f", "arguments": {"x": "unfin', "", [("f", '{"x": "unfin')]),
    # No call after all:
    ("a <tool_call> is a tag", "a <tool_call> is a tag", []),
    ('a <tool_call>{"nam', 'a <tool_call>{"nam', []),
    ("a <tool_cal", "a <tool_cal", []),
    ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ("<tool_call>\n" + call("f", "{}"), "<tool_call>", [("f", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), HERMES)
def test_hermes_calls_are_found(text: str, content: str, calls: Calls) -> None:
    assert read(HermesToolParser(), [text]) == (content, calls)
    assert read(HermesToolParser(), list(text)) == (content, calls)


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<", "tool_call>", '{"name": "f", ', '"arguments": ', '{"x": "', '"}', "}", "]",
     "{}", '{"name"', '"a\\"', " ", "\n", "text", "7", "null", "[", ",", ":"]
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(FRAGMENTS, st.sampled_from([text for text, _, _ in HERMES])), max_size=12), st.data())
def test_hermes_reads_the_same_however_it_is_cut(fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(HermesToolParser(), pieces) == read(HermesToolParser(), [text]) == read(HermesToolParser(), list(text))


SCALARS = st.none() | st.booleans() | st.text(max_size=8) | st.integers()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
ARGUMENTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(min_size=1), ARGUMENTS), min_size=1, max_size=4), st.booleans())
def test_well_formed_calls_come_back_exactly(made: list[tuple[str, Any]], ascii_only: bool) -> None:
    dumped = [json.dumps({"name": n, "arguments": a}, ensure_ascii=ascii_only) for n, a in made]
    expected = [(n, json.dumps(a, ensure_ascii=ascii_only)) for n, a in made]
    text = "".join(f"<tool_call>\n{one}\n</tool_call>\n" for one in dumped)
    assert read(HermesToolParser(), list(text)) == ("", expected)
    assert read(RequiredToolParser(), list(f"[{', '.join(dumped)}]")) == ("", expected)


def test_a_name_is_out_before_its_arguments_are_complete() -> None:
    parser = HermesToolParser()
    [begin, arguments] = parser.feed('<tool_call>{"name": "f", "arguments": {"x": 1').tool_calls
    assert (begin.name, begin.arguments, arguments.arguments) == ("f", "", '{"x": 1')
    [more] = parser.feed("2").tool_calls
    assert (more.index, more.id, more.arguments) == (0, None, "2")


def test_a_named_call_is_the_whole_answer() -> None:
    assert read(NamedToolParser("f"), ['{"x', "", '": 1}']) == ("", [("f", '{"x": 1}')])
    assert read(NamedToolParser("f"), []) == ("", [])


def test_schema_of_required_calls_moves_references_along() -> None:
    inner = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/X"}, "$ref": {"type": "string"}},
        "$defs": {"X": {"type": "array", "items": {"$ref": "#"}}},
    }
    schema = required_schema([{"name": "f"}, {"name": "g", "parameters": inner}], parallel=False)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    root = "#/items/anyOf/1/properties/arguments"
    moved = schema["items"]["anyOf"][1]["properties"]["arguments"]
    assert moved["properties"]["x"] == {"$ref": f"{root}/$defs/X"}
    assert moved["$defs"]["X"]["items"] == {"$ref": root}
    assert inner["properties"]["x"] == {"$ref": "#/$defs/X"}  # type: ignore[index]
    assert "maxItems" not in required_schema([{"name": "f"}], parallel=True)


def test_parser_is_chosen_by_name_or_by_the_chat_template() -> None:
    assert choose_tool_parser("hermes", None) is TOOL_PARSERS["hermes"]
    assert choose_tool_parser("auto", "return a json within <tool_call></tool_call>") is TOOL_PARSERS["hermes"]
    assert choose_tool_parser("auto", "{{ messages }}") is choose_tool_parser("none", "<tool_call>") is None
    with pytest.raises(ConfigError, match=r"'pythonic' is not allowed.*auto, none, hermes"):
        choose_tool_parser("pythonic", None)
