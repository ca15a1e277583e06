"""What a tool parser is, and the incremental reader of one call that parsers share.

Mirrors vllm/tool_parsers/abstract_tool_parser.py. A parser reads one answer piece by piece, and an answer that is not
streamed is read by the same code in one piece: both give the same calls.
"""

import json
import re
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

_SPACE = " \t\r\n"
_SCALAR = re.compile(r"[-+.0-9A-Za-z]")
_CLOSERS = {"{": "}", "[": "]"}


@dataclass(slots=True)
class ToolCallDelta:
    """A piece of one call: the first has `id` and `name`, the others continue `arguments`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class ParsedDelta:
    """What a piece of the answer turned out to be."""

    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def merge(self, later: "ParsedDelta") -> None:
        """Append what came after."""
        self.content += later.content
        self.tool_calls += later.tool_calls


class ToolParser(ABC):
    """Splits one answer into text and calls. Its pieces, joined, do not depend on how the answer was cut."""

    def __init__(self) -> None:
        self.num_calls = 0
        """Calls begun so far."""

    @abstractmethod
    def feed(self, text: str) -> ParsedDelta:
        """Read the next piece; what could still become part of a call is held back."""

    @abstractmethod
    def finish(self) -> ParsedDelta:
        """The answer has ended: what was held back."""

    def _begin_call(self, name: str) -> ToolCallDelta:
        delta = ToolCallDelta(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", name)
        self.num_calls += 1
        return delta

    def _read_call(self, call: "CallObject", begun: bool) -> tuple[list[ToolCallDelta], bool]:
        """The new pieces of `call`, and whether its first piece is out now."""
        deltas = []
        if not begun and call.name is not None:
            deltas.append(self._begin_call(call.name))
            begun = True
        if begun and (arguments := call.take_arguments()):
            deltas.append(ToolCallDelta(self.num_calls - 1, arguments=arguments))
        return deltas, begun


class CallObject:
    """One `{"name": ..., "arguments": {...}}`, read as it comes, its members in any order.

    An arguments object is passed on character by character; arguments that are a string are decoded, null reads as {}.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.state: Literal["open", "closed", "broken"] = "open"
        self.raw = ""
        """What was consumed before the name, to be given back as text when this was no call after all."""
        self._want: Literal["open", "key", "colon", "value", "comma"] = "open"
        self._key = ""
        self._value = ""  # the key or value under way
        self._closers: list[str] = []  # brackets open inside the value
        self._in_string = self._escaped = False
        self._arguments: list[str] = []
        self._has_arguments = False

    def feed(self, text: str) -> int:
        """Read on; returns how many characters belong to the object (fewer than all once it is closed or broken)."""
        taken = 0
        while taken < len(text) and self.state == "open":
            taken += self._step(text[taken])
        if self.name is None:
            self.raw += text[:taken]
        if self.state == "closed" and not self._has_arguments:
            self._arguments, self._has_arguments = ["{}"], True
        return taken

    def take_arguments(self) -> str:
        """The text of the arguments that came since the last time."""
        pieces, self._arguments = self._arguments, []
        return "".join(pieces)

    def _step(self, char: str) -> bool:
        """Read one character; returns whether it was consumed."""
        if self._value:
            return self._go_on(char)
        if char in _SPACE:
            return True
        match self._want, char:
            case "open", "{":
                self._want = "key"
            case "key", '"':
                self._begin(char)
            case "colon", ":":
                self._want = "value"
            case "comma", ",":
                self._want = "key"
            case (("comma" | "key"), "}"):
                self.state = "closed"
            case "value", _ if char in '"{[' or _SCALAR.match(char):
                self._begin(char)
            case _:
                self.state = "broken"
        return self.state != "broken"

    def _begin(self, char: str) -> None:
        self._value, self._in_string, self._escaped = char, char == '"', False
        self._closers = [_CLOSERS[char]] if char in _CLOSERS else []
        if self._passes_on:
            self._arguments.append(char)

    @property
    def _passes_on(self) -> bool:
        return self._want == "value" and self._key in ("arguments", "parameters") and self._value[0] == "{"

    def _go_on(self, char: str) -> bool:
        """One more character of a key or a value; a scalar ends before a character that is not its own."""
        is_scalar = self._value[0] not in '"{['
        if is_scalar and not _SCALAR.match(char):
            self._end()
            return False
        if not is_scalar and not self._is_json(char):
            self.state = "broken"
            return False
        if self._passes_on:
            self._arguments.append(char)
        else:
            self._value += char
        if not is_scalar and not self._in_string and not self._closers:
            self._end()
        return True

    def _is_json(self, char: str) -> bool:
        """Follow strings and brackets; false for what JSON does not allow where it stands."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return True
        if char == '"':
            self._in_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif char in "}]":
            return self._closers.pop() == char
        return char in _SPACE or char in ',:"{[}]' or _SCALAR.match(char) is not None

    def _end(self) -> None:
        text, self._value = self._value, ""
        if self._want == "key":
            self._key, self._want = str(_loads(text) or ""), "colon"
            return
        self._want = "comma"
        if self._key == "name":
            name = _loads(text)
            if isinstance(name, str) and name:
                self.name = name
            else:
                self.state = "broken"
        elif self._key in ("arguments", "parameters"):
            self._has_arguments = True
            if text[0] == '"':
                self._arguments.append(str(_loads(text) or "{}"))
            elif text[0] != "{":
                self._arguments.append("{}" if text == "null" else text)


def held_back(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` could go on from."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def _loads(text: str) -> object:
    try:
        value: object = json.loads(text, strict=False)  # models write newlines inside strings
    except ValueError:
        return None
    return value
