"""What the front end and the engine core say to each other. Mirrors vllm/v1/engine/__init__.py.

Both directions are msgpack of one tagged union each, over a ZMQ ipc socket, or passed as objects in process. What there
is one of per request and step (`gc=False`) is not tracked by the garbage collector: it is never part of a cycle.
"""

from typing import Literal

import msgspec

from folovllm.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineCoreRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add", array_like=True):
    """Front end -> core: one request, tokenised and validated."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end generation unless `ignore_eos`."""
    arrival_time: float = 0.0
    """Seconds, time.time()."""
    cache_salt: str | None = None
    """Separates the prefix caches of tenants: enters the hash of the first block."""
    priority: int = 0
    """Under the priority policy the lower goes first."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """The token sequences of `sampling_params.bad_words`."""
    grammar: str | None = None
    """`sampling_params.structured_outputs`, compiled and checked: a grammar as llguidance takes it."""


class AbortRequests(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """Front end -> core: forget these; unknown ids are ignored."""

    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset", array_like=True):
    """Front end -> core: drop the device's prefix cache, and with `reset_connector` the store behind it too."""

    call_id: int
    reset_connector: bool = False


class ShutdownCore(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    """Front end -> core: finish nothing more, release everything, exit."""


class LogprobsLists(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at consecutive positions, before any sampling option is applied.

    Per position: first the token that stands there, then the most likely ones in falling order (it may be among them).
    """

    logprob_token_ids: list[list[int]]
    logprobs: list[list[float]]
    sampled_token_ranks: list[int]
    """Of the token that stands there: how many tokens are at least as likely as it, itself included; from 1."""


class EngineCoreOutput(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What one step produced for one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token that ended it; None for end of sequence and for length."""
    num_cached_tokens: int = 0
    """Prompt tokens not computed at first scheduling: device hit plus what the connector loaded."""
    num_external_cached_tokens: int = 0
    """The part of `num_cached_tokens` that the connector loaded."""
    scheduled_time: float = 0.0
    """When a step first took it up, in seconds of time.monotonic(), one clock for all processes; 0: never."""
    num_preemptions: int = 0
    """How often it lost its blocks so far."""
    new_logprobs: LogprobsLists | None = None
    """Of `new_token_ids`, when the request asked for them."""
    new_prompt_logprobs: LogprobsLists | None = None
    """Of the prompt's tokens from the second on, once, with the first output token."""


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """State after a step; the counters count since the start of the core, in tokens where they name tokens."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    """Share of the pool's blocks in use, 0 to 1."""
    prefix_cache_queries: int = 0
    """Prompt tokens looked up on the device."""
    prefix_cache_hits: int = 0
    """Of these, tokens found."""
    external_prefix_cache_queries: int = 0
    """Prompt tokens the connector was asked for."""
    external_prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_cached_blocks: int = 0


class EngineCoreOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs", array_like=True):
    """Core -> front end: one step."""

    outputs: list[EngineCoreOutput] = []
    scheduler_stats: SchedulerStats | None = None


class CoreReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready", array_like=True):
    """Core -> front end: the model is loaded; sent once."""

    context_len: int
    """Longest request, prompt and output, in tokens, by the options or else by the model."""
    pool_tokens: int
    """Tokens the KV pool holds when one request has it for itself."""


class CallResult(msgspec.Struct, frozen=True, tag="result", array_like=True):
    """Core -> front end: the answer to a call with this id."""

    call_id: int
    ok: bool


class CoreDied(msgspec.Struct, frozen=True, tag="died", array_like=True):
    """Core -> front end: the last words of a core that failed."""

    reason: str


ToCore = EngineCoreRequest | AbortRequests | ResetPrefixCache | ShutdownCore
FromCore = EngineCoreOutputs | CoreReady | CallResult | CoreDied
