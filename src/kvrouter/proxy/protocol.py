"""The OpenAI bodies the proxy reads, as far as it reads them: whose model, which prompt. The rest is the engine's.

A body is passed on as the bytes that came. What the engine would refuse anyway is refused here only where routing
needs the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from kvrouter.errors import RequestError
from kvrouter.preprocessing.chat_completions import ChatRequest


class CompletionBody(msgspec.Struct):
    """What is read of POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    model: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None

    def first_prompt(self) -> str | list[int]:
        """The prompt that decides where the request goes: the first, if there are several.

        Raises:
            RequestError: a list of token ids with something else in it; status 400.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0] if self.prompt else ""
        if not isinstance(first, int):
            return first
        token_ids = [token for token in self.prompt if isinstance(token, int)]
        if len(token_ids) < len(self.prompt):
            raise RequestError(400, "prompt: a list holds token ids, texts or lists of token ids", param="prompt")
        return token_ids


class ChatBody(msgspec.Struct):
    """What is read of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_request(self) -> ChatRequest:
        """What becomes the prompt; contents in parts become one text, as engines make it."""
        return ChatRequest(
            messages=[{**message, "content": _text(message.get("content"))} for message in self.messages],
            tools=self.tools,
            documents=self.documents,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message is True,
            chat_template=self.chat_template,
            template_kwargs=self.chat_template_kwargs or {},
        )


Body = CompletionBody | ChatBody

_DECODERS: Final[dict[str, msgspec.json.Decoder[CompletionBody] | msgspec.json.Decoder[ChatBody]]] = {
    "/v1/completions": msgspec.json.Decoder(CompletionBody),
    "/v1/chat/completions": msgspec.json.Decoder(ChatBody),
}
COMPLETION_PATHS: Final = tuple(_DECODERS)
"""The endpoints that are routed by prompt."""


def decode_body(path: str, data: bytes) -> Body:
    """Read the body of a request to one of `COMPLETION_PATHS`.

    Raises:
        RequestError: it is not JSON, or a field that is read here has the wrong type; status 400.
    """
    try:
        return _DECODERS[path].decode(data)
    except msgspec.ValidationError as error:
        raise RequestError(400, f"the request is not valid: {error}", param=_param_of(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


class _ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorInfo


class _ModelCard(msgspec.Struct):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "kvstrata"


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]
    object: str = "list"


def encode_error(error: RequestError) -> bytes:
    """An OpenAI error object, as JSON."""
    return msgspec.json.encode(_ErrorBody(_ErrorInfo(error.message, error.kind, error.param, error.code)))


def encode_error_event(error: RequestError) -> bytes:
    """The same as a server-sent event: what ends a stream that cannot go on."""
    return b"data: " + encode_error(error) + b"\n\n"


def encode_models(models: Sequence[str]) -> bytes:
    """The answer of GET /v1/models."""
    return msgspec.json.encode(_ModelList([_ModelCard(model) for model in models]))


def _text(content: Any) -> Any:
    """One text out of a message's content; parts other than text say nothing here."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)


def _param_of(error: msgspec.ValidationError) -> str | None:
    # "... - at `$.prompt[0]`": msgspec tells the path in the message alone
    _, separator, path = str(error).rpartition("`$.")
    if separator:
        return path.rstrip("`").partition("[")[0].partition(".")[0]
    _, separator, name = str(error).rpartition("missing required field `")
    return name.rstrip("`") if separator else None
