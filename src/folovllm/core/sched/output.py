"""What the scheduler tells the model runner, and what it hears back. Mirrors vllm/v1/core/sched/output.py."""

from dataclasses import dataclass, field
from typing import Any

from folovllm.engine.messages import FinishReason, LogprobsLists
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequestData:
    """A request the runner has not seen (or has forgotten): everything it needs to hold a row for it."""

    req_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    block_ids: list[int]
    """The request's whole block table, in token order."""
    num_computed_tokens: int
    """Tokens whose KV is already in the blocks (prefix hit, or loaded by the connector)."""
    eos_token_ids: tuple[int, ...] = ()
    """End-of-sequence tokens, which `min_tokens` masks along with the stop tokens."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    """What its text must look like, as llguidance takes it."""

    @classmethod
    def from_request(cls, request: Request, block_ids: list[int]) -> "NewRequestData":
        """What the runner learns of a request at its first admission."""
        return cls(
            req_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=request.sampling_params,
            block_ids=block_ids,
            num_computed_tokens=request.num_computed_tokens,
            eos_token_ids=request.eos_token_ids,
            bad_words_token_ids=request.bad_words_token_ids,
            grammar=request.grammar,
        )


@dataclass(frozen=True, slots=True)
class CachedRequestData:
    """News of a request that the runner knows: it got blocks, or comes back.

    `resumed_from_preemption`: `block_ids` replaces the row's block table; otherwise it is appended.
    """

    req_id: str
    resumed_from_preemption: bool
    all_token_ids: list[int] | None
    """Prompt and output tokens, only when resumed; else the runner already knows them (it sampled them)."""
    block_ids: list[int]
    num_computed_tokens: int

    @classmethod
    def from_request(cls, request: Request, block_ids: list[int], *, resumed: bool) -> "CachedRequestData":
        """What the runner learns of a request it knows; `block_ids` are all of a resumed one's, else the new ones."""
        return cls(
            req_id=request.request_id,
            resumed_from_preemption=resumed,
            all_token_ids=list(request.all_token_ids) if resumed else None,
            block_ids=block_ids,
            num_computed_tokens=request.num_computed_tokens,
        )


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. Filled by `Scheduler.schedule`, read by the model runner and by the KV connector."""

    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: list[CachedRequestData]
    """Of the known requests of the step, those with news; the others go on in the blocks they have."""
    num_scheduled_tokens: dict[str, int]
    """Request id -> tokens to compute in this step; the token budget is shared by prefills and decodes."""
    total_num_scheduled_tokens: int
    finished_req_ids: set[str]
    """Finished since the last step: the runner drops their rows. Some it has never seen: they ended while waiting."""
    preempted_req_ids: set[str]
    """Preempted since the last step: the runner drops their rows *before* it adds this step's, for they come back as
    resumed, and one whose KV load failed in the last step does so in the same step that names it here."""
    kv_connector_metadata: Any = None
    """Opaque to all but the connector's worker half."""

    @property
    def is_empty(self) -> bool:
        """Whether it tells the runner nothing; then it need not be run."""
        told = self.num_scheduled_tokens or self.finished_req_ids or self.preempted_req_ids
        return not told and self.kv_connector_metadata is None


@dataclass(slots=True)
class KVConnectorOutput:
    """What the worker half of the connector reports after a step."""

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    invalid_block_ids: set[int] = field(default_factory=set)
    """Device blocks whose load failed: their tokens are recomputed."""
    kv_connector_stats: Any = None


@dataclass(slots=True)
class ModelRunnerOutput:
    """One step's result: at most one sampled token per request; partial prefills sample none."""

    sampled_token_ids: dict[str, list[int]]
    kv_connector_output: KVConnectorOutput | None = None
    logprobs: dict[str, LogprobsLists] = field(default_factory=dict)
    """Of the sampled tokens, for the requests that ask for them."""
    prompt_logprobs: dict[str, LogprobsLists] = field(default_factory=dict)
    """Of the whole prompt, in the step that samples the first output token."""
    grammar_ends: dict[str, FinishReason] = field(default_factory=dict)
    """Requests whose grammar allows no more tokens ("stop"), or cannot be followed any further ("error")."""
