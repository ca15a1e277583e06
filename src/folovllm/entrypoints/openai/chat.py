"""Messages and tools to a prompt, and what the tools demand of the answer. Mirrors vllm/entrypoints/chat_utils.py."""

import json
from collections.abc import Callable
from typing import Any

from folovllm.engine.processor import Processor
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, NamedToolChoice, RequestError, TokenizeRequest
from folovllm.entrypoints.openai.tool_parsers import ToolParser, choose_tool_parser
from folovllm.entrypoints.openai.tool_parsers.forced import (
    NamedToolParser,
    RequiredToolParser,
    arguments_schema,
    required_schema,
)
from folovllm.entrypoints.openai.tool_parsers.hermes import START

MakeParser = Callable[[], ToolParser]
# As models write JSON. With white space at will a weak one may go on with it up to the length limit.
_FORM = {"whitespace_pattern": " ?"}


class ChatRenderer:
    """The prompts of one model's chats."""

    def __init__(self, processor: Processor, tool_call_parser: str) -> None:
        """Choose the tool parser.

        Raises:
            ConfigError: there is no parser of this name.
        """
        self._processor = processor
        template = None if processor.tokenizer is None else processor.tokenizer.chat_template
        self._make_parser: MakeParser | None = choose_tool_parser(
            tool_call_parser, None if template is None else template.tool_source
        )
        self._template_takes_tools = template is not None and "tools" in template.tool_source

    def render(self, body: ChatCompletionRequest | TokenizeRequest) -> str:
        """The prompt for the body's messages.

        Raises:
            RequestError: a message or a variable that cannot be used.
            InvalidRequestError: no chat template, or one that refuses the messages.
        """
        messages = [_flatten(message, index) for index, message in enumerate(body.messages or [])]
        if body.continue_final_message and body.add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt=false", param="continue_final_message"
            )
        reserved = {"messages", "add_generation_prompt", "continue_final_message", "tools"}
        if bad := sorted(reserved & body.chat_template_kwargs.keys()):
            raise RequestError(f"chat_template_kwargs must not hold {bad[0]!r}", param="chat_template_kwargs")
        variables = dict(body.chat_template_kwargs)
        if body.tools and getattr(body, "tool_choice", None) != "none":
            if not self._template_takes_tools:
                raise RequestError(
                    "this model's chat template does not take tools", param="tools", code="unsupported_parameter"
                )
            variables["tools"] = [tool.model_dump(exclude_unset=True, exclude_none=True) for tool in body.tools]
        return self._processor.render_chat(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **variables,
        )

    def demand_tools(self, body: ChatCompletionRequest, options: dict[str, Any]) -> MakeParser | None:
        """Put what the tools demand into the sampling options; returns what reads the answers, None: they are text.

        Raises:
            RequestError: tools that cannot be served.
        """
        functions = [tool.function.model_dump() for tool in body.tools or []]
        choice = body.tool_choice or "auto"
        if not functions or choice == "none":
            return None
        if choice == "auto":
            return self._auto_parser(options)
        if "structured_outputs" in options:
            raise RequestError("a forced tool_choice leaves no other choice of the answer's form", param="tool_choice")
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            [function, *_] = [f for f in functions if f["name"] == name]
            options["structured_outputs"] = {"json": arguments_schema(function), **_FORM}
            return lambda: NamedToolParser(name)
        schema = required_schema(functions, body.parallel_tool_calls is not False)
        options["structured_outputs"] = {"json": schema, **_FORM}
        return RequiredToolParser

    def _auto_parser(self, options: dict[str, Any]) -> MakeParser:
        if self._make_parser is None:
            raise RequestError(
                "tools with tool_choice='auto' need a parser of the model's calls, and its chat template mentions no "
                "format that is known; start the server with --tool-call-parser, or force a call with tool_choice",
                param="tools",
                code="unsupported_parameter",
            )
        tokenizer = self._processor.require_tokenizer()
        if tokenizer.backend.token_to_id(START) in tokenizer.special_token_ids:
            options["skip_special_tokens"] = False  # the parser must see its marks
        return self._make_parser


def _flatten(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is one text, as chat templates expect it."""
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where} has no role", param=where)
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text or a list of text parts", param=where)
    flat = {**message, "content": content}
    if message.get("tool_calls") is not None:
        flat["tool_calls"] = _earlier_calls(message["tool_calls"], f"{where}.tool_calls")
    return flat


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(
        f"{where} has a content part of type {kind!r}; only 'text' is supported",
        param=where,
        code="unsupported_parameter",
    )


def _earlier_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an earlier answer, their arguments as objects: as text they come in, but templates print objects."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list", param=where)
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where} has a call without function.name", param=where)
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise RequestError(f"{where} has arguments that are not JSON: {error}", param=where) from error
        if not isinstance(arguments, dict):
            raise RequestError(f"{where} has arguments that are not a JSON object", param=where)
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read
