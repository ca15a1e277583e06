"""Tool parsers: one file per way in which models write calls. A new one is a class and a line in `TOOL_PARSERS`."""

from collections.abc import Callable

from folovllm.entrypoints.openai.tool_parsers.base import ParsedDelta, ToolCallDelta, ToolParser
from folovllm.entrypoints.openai.tool_parsers.hermes import START, HermesToolParser
from folovllm.errors import ConfigError

TOOL_PARSERS: dict[str, Callable[[], ToolParser]] = {"hermes": HermesToolParser}
_TELL_TALES = {START: "hermes"}
"""What a chat template that explains the format to the model must mention."""


def choose_tool_parser(name: str, chat_template: str | None) -> Callable[[], ToolParser] | None:
    """The parser of this name; "auto" is the one whose format the chat template teaches, "none" is none.

    Raises:
        ConfigError: there is no such parser.
    """
    if name == "auto":
        found = [parser for mark, parser in _TELL_TALES.items() if mark in (chat_template or "")]
        return TOOL_PARSERS[found[0]] if found else None
    if name == "none":
        return None
    if name not in TOOL_PARSERS:
        allowed = ", ".join(("auto", "none", *TOOL_PARSERS))
        raise ConfigError(f"tool_call_parser={name!r} is not allowed; it must be one of {allowed}")
    return TOOL_PARSERS[name]


__all__ = ["TOOL_PARSERS", "ParsedDelta", "ToolCallDelta", "ToolParser", "choose_tool_parser"]
