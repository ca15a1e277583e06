"""Messages -> prompt text, as the engine renders them: the checkpoint's Jinja chat template, in a sandbox.

Equal to `apply_chat_template` of transformers 5 for the same messages, tools, documents and template variables; its
import is avoided because it takes longer than the router's whole start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvrouter.errors import PromptError, TokenizerLoadError
from kvrouter.tokenization.tokenizer import LocalTokenizer, TokenArray, Tokenizer, resolve_checkpoint

Message: TypeAlias = Mapping[str, Any]

_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK: Final = "\x02CONTINUE\x03 "  # the space shows whether the template trims what it is given


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """The part of a chat completion request that becomes the prompt."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    """Name of one of the checkpoint's templates. A template of the client's own is not run here."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the template reads, such as `enable_thinking`."""


class ChatTemplate:
    """The chat templates of a checkpoint; any number of threads may render."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compile templates.

        Args:
            templates: sources by name; "default" is what a request gets, "tool_use" one with tools.
            special_tokens: `bos_token`, `eos_token` ... -> their text, which templates may name.

        Raises:
            TokenizerLoadError: a source is no Jinja template.
        """
        self._environment = _make_environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {name: (source, self._compile(source)) for name, source in templates.items()}

    @classmethod
    def from_checkpoint(cls, directory: Path) -> ChatTemplate | None:
        """Read a checkpoint's templates; None if it has none.

        Raises:
            TokenizerLoadError: a file is damaged.
        """
        config = _read_json(directory / "tokenizer_config.json")
        templates = _read_templates(directory, config)
        if not templates:
            return None
        return cls(templates, _read_special_tokens(_read_json(directory / "special_tokens_map.json") | config))

    def render(self, request: ChatRequest) -> str:
        """Return the prompt of a conversation.

        Raises:
            PromptError: there are no messages, or the template refuses them.
        """
        if not request.messages:
            raise PromptError("a chat needs at least one message")
        if request.continue_final_message and request.add_generation_prompt:
            raise PromptError("continue_final_message and add_generation_prompt exclude each other")
        source, template = self._choose(request)
        messages = [_with_reasoning({k: v for k, v in m.items() if v is not None}) for m in request.messages]
        final = _mark_final_message(messages, source) if request.continue_final_message else None
        variables: dict[str, Any] = {**self._special_tokens, **request.template_kwargs}
        variables |= {
            "messages": messages,
            "tools": request.tools,
            "documents": request.documents,
            "add_generation_prompt": request.add_generation_prompt,
        }
        try:
            text = template.render(variables)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise PromptError(f"the chat template refuses this conversation: {error}") from error
        return text if final is None else _cut_at_mark(text, final)

    def _choose(self, request: ChatRequest) -> tuple[str, jinja2.Template]:
        name = request.chat_template
        if name is not None:
            if name not in self._templates:
                raise PromptError(f"chat_template: the checkpoint has {', '.join(self._templates)} only")
            return self._templates[name]
        if request.tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise PromptError(f"the checkpoint has no default chat template; it has {', '.join(self._templates)}")
        return self._templates["default"]

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerLoadError(f"the checkpoint's chat template does not compile: {error}") from error


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """What turns a model's requests into token ids, exactly as its engine does."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None

    @classmethod
    def load(cls, path_or_id: str) -> ModelTokenizer:
        """Load both from a checkpoint directory or a Hugging Face id.

        Raises:
            TokenizerLoadError: there is no tokenizer, or a file is damaged.
        """
        directory = resolve_checkpoint(path_or_id)
        return cls(LocalTokenizer(directory), ChatTemplate.from_checkpoint(directory))

    def encode_prompt(self, prompt: str, *, add_special_tokens: bool = True) -> TokenArray:
        """Token ids of a completion prompt, special tokens included unless told otherwise.

        Raises:
            PromptError: the prompt is no Unicode text.
        """
        return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    def encode_chat(self, request: ChatRequest, *, add_special_tokens: bool = False) -> TokenArray:
        """Token ids of a conversation; the template has put the special tokens already.

        Raises:
            PromptError: there is no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise PromptError("this model has no chat template")
        return self.tokenizer.encode(self.chat_template.render(request), add_special_tokens=add_special_tokens)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; rendering it is rendering its body.

    A call block, not the bare body: what the body assigns stays inside it, as in transformers.
    """

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(lineno)

    def _render(self, caller: Any) -> str:
        return str(caller())


def _make_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Offer a message's reasoning under the names that templates read it by."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_final_message(messages: list[dict[str, Any]], source: str) -> str:
    """Put a mark behind the text of the last message, and return that text."""
    content = messages[-1].get("content")
    if content is None or "content" not in source:
        raise PromptError("continue_final_message needs a final message with content that the template shows")
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_MARK
        return content
    parts = [dict(part) for part in content]
    for part in reversed(parts):
        if "text" in part:
            text = str(part["text"])
            part["text"] = text + _CONTINUE_MARK
            messages[-1]["content"] = parts
            return text
    raise PromptError("continue_final_message needs text in the final message")


def _cut_at_mark(text: str, final: str) -> str:
    mark = _CONTINUE_MARK.strip()
    at = text.rfind(mark)
    if at < 0 or final.strip() not in text:
        raise PromptError("continue_final_message: the chat template does not show the final message as it is")
    keeps_spaces = text.startswith(_CONTINUE_MARK, at)
    return text[:at] if keeps_spaces else text[:at].rstrip()


def _read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name: the .jinja files where there are any, else what tokenizer_config.json says."""
    templates = {}
    default = directory / "chat_template.jinja"
    if default.is_file():
        templates["default"] = default.read_text(encoding="utf-8")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if templates:
        return templates
    source = config.get("chat_template")
    if isinstance(source, str):
        return {"default": source}
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}
    return dict(source) if isinstance(source, dict) else {}


def _read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerLoadError(f"{path} is no JSON object")
    return value
