"""What a user gets back. Mirrors vllm/outputs.py."""

from dataclasses import dataclass

from folovllm.engine.messages import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position, before any sampling option is applied."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    decoded_token: str | None = None
    """Its text; None without a tokenizer. An incomplete character reads as U+FFFD."""


PositionLogprobs = dict[int, Logprob]
"""Token id -> its log-probability at one position: the token that stands there first, then the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence; while streaming, all of it so far."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it."""
    logprobs: list[PositionLogprobs] | None = None
    """One entry per token of `token_ids`, when `SamplingParams.logprobs` asked for them."""
    cumulative_logprob: float | None = None
    """The sum over `token_ids`, when `logprobs` are there."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of time.monotonic()."""

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """Prompt tokens that were not computed: found on the device or loaded by the KV connector."""
    num_external_cached_tokens: int
    """The part of `num_cached_tokens` that the KV connector loaded."""
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One entry per prompt token, None for the first, when `SamplingParams.prompt_logprobs` asked for them."""

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(output.finished for output in self.outputs)
