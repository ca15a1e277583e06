"""Calls as Hermes and Qwen models write them. Mirrors vllm/tool_parsers/hermes_tool_parser.py.

    text <tool_call> {"name": "f", "arguments": {"x": 1}} </tool_call> <tool_call> ... </tool_call>

    TEXT --<tool_call>--> CALL --object closed, or broken after its name--> TAIL --</tool_call>--> TEXT
                           '---- broken before its name: it was text ----------------------------> TEXT

White space around a call belongs to the format, not to the text.
"""

from typing import Literal

from folovllm.entrypoints.openai.tool_parsers.base import CallObject, ParsedDelta, ToolParser, held_back

START, END = "<tool_call>", "</tool_call>"


class HermesToolParser(ToolParser):
    """Reads `<tool_call>` sections; one that does not hold a call is text."""

    def __init__(self) -> None:
        super().__init__()
        self._mode: Literal["text", "call", "tail"] = "text"
        self._buffer = ""
        self._space = ""  # before the section under way
        self._after_call = False
        self._call = CallObject()
        self._begun = False

    def feed(self, text: str) -> ParsedDelta:
        """See `ToolParser.feed`."""
        self._buffer += text
        parsed = ParsedDelta()
        steps = {"text": self._read_text, "call": self._read_section, "tail": self._read_tail}
        while True:
            before = self._mode
            steps[before](parsed)
            if self._mode == before:
                return parsed

    def finish(self) -> ParsedDelta:
        """See `ToolParser.finish`."""
        rest, self._buffer = self._buffer, ""
        if self._mode == "text":
            return ParsedDelta("" if self._after_call and not rest.strip() else rest)
        if self._mode == "call" and not self._begun:
            return ParsedDelta(self._space + START + self._call.raw + rest)
        return ParsedDelta()

    def _read_text(self, parsed: ParsedDelta) -> None:
        begin = self._buffer.find(START)
        if begin >= 0:
            text = self._buffer[:begin].rstrip()
            self._emit_text(parsed, text)
            self._space = "" if self._after_call else self._buffer[len(text) : begin]
            self._buffer = self._buffer[begin + len(START) :]
            self._mode, self._call, self._begun = "call", CallObject(), False
            return
        certain = self._buffer[: len(self._buffer) - held_back(self._buffer, START)].rstrip()
        self._buffer = self._buffer[len(certain) :]
        self._emit_text(parsed, certain)

    def _emit_text(self, parsed: ParsedDelta, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            parsed.content += text

    def _read_section(self, parsed: ParsedDelta) -> None:
        taken = self._call.feed(self._buffer)
        self._buffer = self._buffer[taken:]
        deltas, self._begun = self._read_call(self._call, self._begun)
        parsed.tool_calls += deltas
        if self._call.state == "open":
            return
        if self._begun:
            self._mode = "tail"
        else:
            self._after_call = False
            parsed.content += self._space + START
            self._buffer = self._call.raw + self._buffer
            self._mode = "text"

    def _read_tail(self, parsed: ParsedDelta) -> None:
        rest = self._buffer.lstrip()
        if self._call.state == "broken":  # whatever it is up to the end, or to the next call
            found = [at for tag in (START, END) if (at := rest.find(tag)) >= 0]
            if not found:
                return
            rest = rest[min(found) :]
        if END.startswith(rest) and rest != END:
            return
        self._buffer = rest.removeprefix(END)  # models forget it at times: then what follows is text
        self._mode, self._after_call = "text", True
