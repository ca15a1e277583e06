"""Bodies of the answers: OpenAI's, and vLLM's additions to them. Mirrors vllm's protocol.py files."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from folovllm.engine.messages import FinishReason


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


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of a completion's tokens; the lists run in parallel."""

    text_offset: list[int]
    """Where each token begins in the text."""
    token_logprobs: list[float | None]
    """None for the first token of a prompt."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct):
    """One token at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""One entry per token of the prompt, None for the first."""


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """One token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The token that stands there, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class FunctionCall(msgspec.Struct):
    """What is called; in a stream, only the first piece has the name."""

    name: str | UnsetType = UNSET
    arguments: str = ""
    """JSON, as the model wrote it."""


class ToolCall(msgspec.Struct, omit_defaults=True):
    """One call, or a piece of it."""

    function: FunctionCall
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET
    """Which call a piece belongs to; only in streams."""


class ChatMessage(msgspec.Struct):
    """The answer of the model, or a piece of it; the first piece tells the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None


class CompletionBody(msgspec.Struct, kw_only=True):
    """Answer of the two completion endpoints, and each chunk of their streams."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice | ChatChoice | ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Of a chat's prompt; completions have them in their choices."""


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
