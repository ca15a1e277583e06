"""Bodies of the requests: OpenAI's, and vLLM's additions to them. Mirrors vllm's protocol.py files.

A parameter is honoured, or refused by name, or (when it cannot change the result) accepted and unused: never ignored.
"""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from folovllm.errors import InvalidRequestError

# Parameters that change the result and are not served: name -> the values that ask for nothing.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
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
# Fields of a body that are fields of SamplingParams under the same name.
_SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "min_tokens", "bad_words", "logit_bias", "allowed_token_ids", "ignore_eos",
    "prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output",
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
    continuous_usage_stats: bool = False
    """Tell the usage so far in every chunk (vLLM's extension)."""


class JsonSchema(BaseModel):
    """A schema with its name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Taken as true: the answer always follows the schema."""


class ResponseFormat(BaseModel):
    """What the answer must look like."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured_outputs(self) -> dict[str, Any] | None:
        """The same as an option of `SamplingParams`; None for text.

        Raises:
            RequestError: there is no schema where one belongs.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"json_object": True}
        if self.json_schema is None or self.json_schema.json_schema is None:
            raise RequestError("response_format has no json_schema.schema", param="response_format")
        return {"json": self.json_schema.json_schema}


class _GenerationRequest(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    bad_words: list[str] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt, not in a stream (vLLM's extension)."""
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    """The fields of `StructuredOutputsParams` (vLLM's extension)."""
    cache_salt: str | None = None
    """Requests share cached blocks only with requests of the same salt (vLLM's extension)."""
    priority: int = 0
    """Under the priority policy the lower goes first (vLLM's extension)."""

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
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs is not allowed with stream=true", param="prompt_logprobs")
        if self.cache_salt is not None and not self.cache_salt:
            raise RequestError("cache_salt='' is not allowed; it must be a non-empty string", param="cache_salt")

    def sampling_options(self) -> dict[str, Any]:
        """The given options that `SamplingParams` knows, `max_tokens` apart.

        Raises:
            RequestError: two of them contradict each other.
        """
        options = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) not in (None, {})}
        shape = None if self.response_format is None else self.response_format.structured_outputs()
        if shape is not None and self.structured_outputs is not None:
            raise RequestError(
                "response_format and structured_outputs cannot be used together", param="structured_outputs"
            )
        if shape is not None or self.structured_outputs is not None:
            options["structured_outputs"] = shape or self.structured_outputs
        return options

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = 16
    """0 is allowed with `echo`: nothing but the prompt comes back."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and those of this many most likely ones."""
    echo: bool = False
    """Begin the text with the prompt, and the log-probabilities with the prompt's."""
    add_special_tokens: bool = True

    def sampling_options(self) -> dict[str, Any]:
        """See `_GenerationRequest.sampling_options`."""
        options = super().sampling_options()
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if self.echo:
                options["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return options


class FunctionDefinition(BaseModel):
    """A function the model may call; what else it says goes to the chat template too."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None
    """Forced calls follow the schema in any case; calls of the model's own choice are not constrained."""


class Tool(BaseModel):
    """A tool the model may use."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(BaseModel):
    """One of the tools' functions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedToolChoice(BaseModel):
    """The function that must be called."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"] = "function"
    function: FunctionName


class _ChatPrompt(BaseModel):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Go on with the last message instead of answering it; needs `add_generation_prompt` false (vLLM's extension)."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: list[Tool] | None = None


class ChatCompletionRequest(_GenerationRequest, _ChatPrompt):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_special_tokens: bool = False
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    """None: auto with tools. With "none" the model is not told of the tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call."""

    def check_parameters(self) -> None:
        """See `_GenerationRequest.check_parameters`."""
        super().check_parameters()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs=true", param="top_logprobs")
        names = [tool.function.name for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise RequestError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools: {names}",
                param="tool_choice",
            )
        if self.tool_choice == "required" and not names:
            raise RequestError("tool_choice='required' is only allowed with tools", param="tool_choice")

    def sampling_options(self) -> dict[str, Any]:
        """See `_GenerationRequest.sampling_options`."""
        options = super().sampling_options()
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return options


class TokenizeRequest(_ChatPrompt):
    """POST /tokenize: a prompt, or messages for the chat template."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """Default: yes for a prompt, no for messages."""
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[int]
