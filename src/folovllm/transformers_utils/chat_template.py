"""Chat templates: the Jinja program of a checkpoint that turns messages into one prompt."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from folovllm.errors import InvalidRequestError, ModelLoadError

Message = dict[str, Any]
_END_MARK = "\ue000end of the message\ue000"  # private characters: no text that comes in has them together


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; for serving its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. Rendering is sandboxed: the template came with the checkpoint, not with us."""

    def __init__(self, source: str, special_tokens: dict[str, str], tool_source: str | None = None) -> None:
        """Compile `source`; `special_tokens` (`bos_token`, `eos_token`, ...) are its global variables.

        `tool_source` is another template, for conversations with tools.

        Raises:
            ModelLoadError: the source is not a Jinja template.
        """
        self.tool_source = source if tool_source is None else tool_source
        """What tells the model of tools, and how to call them."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.globals.update(special_tokens)
        try:
            self._template = environment.from_string(source)
            self._tool_template = environment.from_string(self.tool_source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"the checkpoint's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; `variables` are whatever else the template reads, such as `enable_thinking`.

        With `continue_final_message` it ends with the last message's content, for the model to go on with.

        Raises:
            InvalidRequestError: the template refuses the messages, or does not show the last one's content.
        """
        # Templates are written for transformers, which always defines these two.
        variables = {"tools": None, "documents": None, **variables}
        template = self._tool_template if variables["tools"] else self._template
        shown = list(messages)
        if continue_final_message:
            shown[-1] = {**shown[-1], "content": f"{shown[-1].get('content') or ''}{_END_MARK}"}
        try:
            text = template.render(messages=shown, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error
        if not continue_final_message:
            return text
        before, mark, _ = text.rpartition(_END_MARK)
        if not mark:
            raise InvalidRequestError(
                "the model's chat template does not show the last message: it cannot be continued"
            )
        return before


def load_chat_template(
    directory: Path, tokenizer_config: dict[str, Any], special_tokens: dict[str, str]
) -> ChatTemplate | None:
    """The checkpoint's chat template: `chat_template.jinja`, else the entry in tokenizer_config.json, else None."""
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config.get("chat_template")
    tool_source = None
    if isinstance(source, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in source}
        source, tool_source = named.get("default"), named.get("tool_use")
    return ChatTemplate(source, special_tokens, tool_source) if isinstance(source, str) else None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
