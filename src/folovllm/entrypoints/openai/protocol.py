"""Bodies of the OpenAI API, and of vLLM's additions to it: pydantic for what comes in, msgspec for what goes out.

A parameter is honoured, or refused by name, or (when it cannot change the result) accepted and unused: never ignored.
"""

import difflib
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field

from folovllm.engine.messages import FinishReason
from folovllm.errors import InvalidRequestError

# Parameters that change the result and are not served: name -> the values that ask for nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "structured_outputs": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "priority": (0,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "kv_transfer_params": (),
}
# Parameters that cannot change the result.
_HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention",
    }
)  # fmt: skip


class RequestError(InvalidRequestError):
    """A request that is answered with an OpenAI error: which parameter is to blame, and a code programs can read."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    """Send one more chunk, without choices, that tells the usage."""


class _GenerationRequest(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None
    """Requests share cached blocks only with requests of the same salt (vLLM's extension)."""

    def check_parameters(self) -> None:
        """Refuse what this server does not do.

        Raises:
            RequestError: a parameter that is unknown, or known and not served.
        """
        known = [*type(self).model_fields, *_NEUTRAL_VALUES, *_HARMLESS]
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or value is None:
                continue
            if name not in _NEUTRAL_VALUES:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RequestError(f"unknown parameter {name!r}{hint}", param=name, code="unknown_parameter")
            neutral = _NEUTRAL_VALUES[name]
            # True == 1 in Python, but logprobs=0 is not logprobs=False.
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
                allowed = f"; only {' or '.join(map(repr, neutral))} is" if neutral else ""
                raise RequestError(
                    f"{name}={value!r} is not supported by this server{allowed}",
                    param=name,
                    code="unsupported_parameter",
                )
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream=true", param="stream_options")
        if self.cache_salt is not None and not self.cache_salt:
            raise RequestError("cache_salt='' is not allowed; it must be a non-empty string", param="cache_salt")

    def sampling_options(self) -> dict[str, Any]:
        """The given options that `SamplingParams` knows, `max_tokens` apart."""
        names = (
            "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos",
            "skip_special_tokens", "include_stop_str_in_output",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = 16
    add_special_tokens: bool = True


class ChatCompletionRequest(_GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or messages for the chat template."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """Default: yes for a prompt, no for messages."""
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[int]


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    """Answer of /detokenize."""

    prompt: str


class PromptTokensDetails(msgspec.Struct):
    """Where the prompt's KV came from, in tokens."""

    cached_tokens: int
    """Not computed: found on the device or loaded by the KV connector."""
    external_cached_tokens: int
    """The part of `cached_tokens` that the KV connector loaded."""


class Usage(msgspec.Struct):
    """Tokens of one API call, over all its prompts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completed prompt, or a piece of it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatMessage(msgspec.Struct):
    """The answer of the model, or a piece of it; the first piece tells the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: ChatMessage
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class CompletionBody(msgspec.Struct, kw_only=True):
    """Answer of the two completion endpoints, and each chunk of their streams."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """The served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "folovllm"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class ErrorInfo(msgspec.Struct, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """Every answer that is not a success."""

    error: ErrorInfo
