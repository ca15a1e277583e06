"""Answers that must be calls: a grammar constrains them to JSON, so there is no text around it.

tool_choice "required"       [{"name": "f", "arguments": {...}}, ...]
tool_choice {"function": f}  {...}, the arguments alone
"""

from collections.abc import Sequence
from typing import Any

from folovllm.entrypoints.openai.tool_parsers.base import CallObject, ParsedDelta, ToolCallDelta, ToolParser


class NamedToolParser(ToolParser):
    """The whole answer is the arguments of one call."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def feed(self, text: str) -> ParsedDelta:
        """See `ToolParser.feed`."""
        if not text:
            return ParsedDelta()
        deltas = [self._begin_call(self._name)] if not self.num_calls else []
        return ParsedDelta(tool_calls=[*deltas, ToolCallDelta(0, arguments=text)])

    def finish(self) -> ParsedDelta:
        """See `ToolParser.finish`."""
        return ParsedDelta()


class RequiredToolParser(ToolParser):
    """The answer is an array of calls; what follows a malformed one is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._call: CallObject | None = None
        self._begun = self._ended = False

    def feed(self, text: str) -> ParsedDelta:
        """See `ToolParser.feed`."""
        parsed = ParsedDelta()
        while text and not self._ended:
            if self._call is None:
                char, text = text[0], text[1:]
                if char == "{":
                    self._call, self._begun = CallObject(), False
                    self._call.feed(char)
                self._ended = char == "]"
                continue
            text = text[self._call.feed(text) :]
            deltas, self._begun = self._read_call(self._call, self._begun)
            parsed.tool_calls += deltas
            self._ended = self._call.state == "broken"
            if self._call.state == "closed":
                self._call = None
        return parsed

    def finish(self) -> ParsedDelta:
        """See `ToolParser.finish`."""
        return ParsedDelta()


def required_schema(functions: Sequence[dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of one or more calls of `functions` (`name`, `parameters`); of exactly one unless `parallel`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": _moved(arguments_schema(function), f"#/items/anyOf/{index}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else {**schema, "maxItems": 1}


def arguments_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments; a function without parameters takes none."""
    parameters = function.get("parameters")
    return dict(parameters) if parameters else {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references into itself hold where it stands now: at `root` of a larger one."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
