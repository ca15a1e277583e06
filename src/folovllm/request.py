"""The state of one request inside the engine core. Mirrors vllm/v1/request.py."""

import enum
from collections.abc import Callable, Sequence

from folovllm.engine.messages import EngineCoreRequest, FinishReason
from folovllm.sampling_params import SamplingParams

BlockHashFn = Callable[["Request"], list[bytes]]
"""The digests of the request's full blocks that are not in `block_hashes` yet."""


class RequestStatus(enum.IntEnum):
    """Where a request stands; everything from FINISHED_STOPPED on is final."""

    WAITING = enum.auto()
    WAITING_FOR_REMOTE_KVS = enum.auto()
    """Holds blocks that the KV connector is loading; not schedulable until it is done."""
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    """Waits again; the model runner has forgotten it."""
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH_CAPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended."""
        return self >= RequestStatus.FINISHED_STOPPED


_FINISH_REASONS: dict[RequestStatus, FinishReason] = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}


class Request:
    """Owned by the scheduler; connectors read it and change nothing.

        tokens            | prompt                    | output      |
        KV in the blocks  | num_computed_tokens ->        . . . . . |    behind by what is still to be scheduled
        block_hashes      | full blocks of prompt and output  | tail: none

    A request has no prefill or decode phase: in each step it catches up `num_tokens - num_computed_tokens`.
    """

    __slots__ = (
        "_all_token_ids",
        "_block_hash_fn",
        "arrival_time",
        "bad_words_token_ids",
        "block_hashes",
        "cache_salt",
        "eos_token_ids",
        "grammar",
        "kv_load_failed",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_external_cached_tokens",
        "num_output_placeholders",
        "num_preemptions",
        "num_prompt_tokens",
        "num_steps_in_flight",
        "priority",
        "prompt_token_ids",
        "request_id",
        "sampling_params",
        "scheduled_time",
        "status",
        "stop_reason",
        "was_scheduled",
    )

    def __init__(self, request: EngineCoreRequest, block_hash_fn: BlockHashFn | None = None) -> None:
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.sampling_params: SamplingParams = request.sampling_params
        self.eos_token_ids = request.eos_token_ids
        self.arrival_time = request.arrival_time
        self.cache_salt = request.cache_salt
        self.priority = request.priority
        """Under the priority policy the lower goes first."""
        self.bad_words_token_ids = request.bad_words_token_ids
        self.grammar = request.grammar
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.num_computed_tokens = 0
        """Tokens whose KV is in the blocks, or is being written by the steps or the load under way."""
        self.num_output_placeholders = 0
        """Tokens that steps in flight sample. Without asynchronous scheduling there are none between two steps."""
        self.num_steps_in_flight = 0
        """Steps that compute it and whose result is not in: until then its blocks stay its own."""
        self.num_preemptions = 0
        self.scheduled_time = 0.0
        """When it was first scheduled, in seconds of time.monotonic(); 0 until then."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens that were not computed, external ones included; None until first scheduled."""
        self.num_external_cached_tokens = 0
        """The part of `num_cached_tokens` that the connector loaded."""
        self.kv_load_failed = False
        """A block of it failed to load, so the connector is not asked again: the same bad entry would match again."""
        self.was_scheduled = False
        """The model runner knows it: it comes back as resumed, not as new."""
        self._all_token_ids = list(request.prompt_token_ids)
        self._block_hash_fn = block_hash_fn
        self.block_hashes: list[bytes] = []
        """Digests of the full blocks of `all_token_ids`; empty without prefix caching and connector."""
        self._extend_block_hashes()

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Prompt and output tokens; not to be changed, use `append_output_token_ids`."""
        return self._all_token_ids

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output tokens."""
        return self._all_token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self._all_token_ids)

    @property
    def num_tokens_with_placeholders(self) -> int:
        """Prompt and output tokens, those included that steps in flight sample."""
        return len(self._all_token_ids) + self.num_output_placeholders

    def get_rank(self) -> tuple[int, float, str]:
        """Its place under the priority policy: the lowest goes first, the highest is preempted first."""
        return self.priority, self.arrival_time, self.request_id

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self._all_token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.status >= RequestStatus.FINISHED_STOPPED

    @property
    def skip_reading_prefix_cache(self) -> bool:
        """Whether all its prompt must be computed: log-probabilities of tokens that are not computed are not known."""
        return self.sampling_params.prompt_logprobs is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return _FINISH_REASONS[self.status] if self.status >= RequestStatus.FINISHED_STOPPED else None

    def append_output_token_ids(self, token_ids: Sequence[int]) -> None:
        """Add generated tokens and hash the blocks they fill."""
        self._all_token_ids.extend(token_ids)
        if self._block_hash_fn is not None:
            self._extend_block_hashes()

    def note_cached_tokens(self, num_cached_tokens: int, num_external_tokens: int) -> None:
        """Record at first scheduling what need not be computed; later calls (after a preemption) change nothing."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_cached_tokens
            self.num_external_cached_tokens = num_external_tokens

    def forget_cached_tokens(self, num_kept_tokens: int) -> None:
        """Correct the record after a failed load: only the first `num_kept_tokens` were really cached."""
        if self.num_cached_tokens is not None and self.num_cached_tokens > num_kept_tokens:
            num_lost = self.num_cached_tokens - num_kept_tokens
            # What loses all before it is ever scheduled will be looked up again.
            self.num_cached_tokens = num_kept_tokens if num_kept_tokens or self.was_scheduled else None
            self.num_external_cached_tokens = max(0, self.num_external_cached_tokens - num_lost)

    def check_stop(self, max_model_len: int, grammar_end: FinishReason | None = None) -> bool:
        """Whether the last output token ends the request; then sets `status` and `stop_reason`.

        Order: end of sequence, stop tokens, the grammar's end, length. Stop strings are the detokeniser's.
        """
        params, last, num_tokens = self.sampling_params, self._all_token_ids[-1], len(self._all_token_ids)
        num_output_tokens = num_tokens - self.num_prompt_tokens
        may_stop = num_output_tokens >= params.min_tokens
        if may_stop and last in self.eos_token_ids and not params.ignore_eos:
            self.status = RequestStatus.FINISHED_STOPPED
        elif may_stop and last in params.stop_token_ids:
            self.status = RequestStatus.FINISHED_STOPPED
            self.stop_reason = last
        elif grammar_end is not None:
            is_error = grammar_end == "error"
            self.status = RequestStatus.FINISHED_ERROR if is_error else RequestStatus.FINISHED_STOPPED
        elif num_tokens >= max_model_len or num_output_tokens == params.max_tokens:
            self.status = RequestStatus.FINISHED_LENGTH_CAPPED
        else:
            return False
        return True

    def _extend_block_hashes(self) -> None:
        if self._block_hash_fn is not None:
            self.block_hashes.extend(self._block_hash_fn(self))
