"""Which tokens of which requests the next step computes. Mirrors vllm/v1/core/sched/scheduler.py.

    add_request -> waiting --admit--> running --stop, abort--> finished
                    ^   |               |
                    |   +--load starts--+--no room: preempt, load failed: rewind--+
                    |   v                                                         |
                    +-- WAITING_FOR_REMOTE_KVS                                    |
                    +-------------------------------------------------------------+

Each step is `schedule()`, the model, `update_from_output()`; one thread does all three.
"""

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from folovllm.config import CacheConfig, SchedulerConfig
from folovllm.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from folovllm.core.kv_cache_utils import cdiv
from folovllm.core.kv_connector import KVConnector
from folovllm.core.sched.kv_transfer import ExternalHit, KVTransfers
from folovllm.core.sched.output import (
    CachedRequestData,
    KVConnectorOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
)
from folovllm.core.sched.request_queue import create_request_queue
from folovllm.core.sched.stats import SchedulerCounters
from folovllm.engine.messages import EngineCoreOutput, SchedulerStats
from folovllm.errors import InvalidRequestError
from folovllm.request import Request, RequestStatus

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Step:
    """What has been scheduled so far in this step."""

    token_budget: int
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    new: list[NewRequestData] = field(default_factory=list)
    cached: list[CachedRequestData] = field(default_factory=list)
    has_preempted: bool = False

    def add(self, request: Request, num_tokens: int) -> None:
        self.num_scheduled_tokens[request.request_id] = num_tokens
        self.token_budget -= num_tokens


class _Admission(enum.Enum):
    ADMITTED = enum.auto()
    SKIPPED = enum.auto()
    """It waits for a load, or for the connector's answer; others may go first."""
    OVER_BUDGET = enum.auto()
    NO_ROOM = enum.auto()


class Scheduler:
    """Owns all requests and their blocks; used by one thread.

    There are no prefill and decode phases: a request has `num_tokens` tokens, of which `num_computed_tokens` have KV,
    and each step lets it catch up within one token budget. That covers chunked prefills, prefix hits, recomputation.
    """

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        max_model_len: int,
        *,
        connector: KVConnector | None = None,
        kv_load_failure_policy: Literal["recompute", "fail"] = "recompute",
        enable_kv_cache_events: bool = False,
    ) -> None:
        self.scheduler_config = scheduler_config
        self.max_model_len = max_model_len
        self.block_size = cache_config.block_size
        self.kv_cache_manager = KVCacheManager(
            cache_config.num_kv_blocks,
            cache_config.block_size,
            enable_caching=cache_config.enable_prefix_caching,
            enable_kv_cache_events=enable_kv_cache_events,
        )
        self.transfers = KVTransfers(connector, self.kv_cache_manager, kv_load_failure_policy)
        self.connector = connector
        # Unfinished requests, in order of arrival; each is in exactly one of `waiting` and `running`.
        self.requests: dict[str, Request] = {}
        self.waiting = create_request_queue(scheduler_config.policy)
        self.running: list[Request] = []
        # What the model runner has not been told yet.
        self._finished_req_ids: set[str] = set()
        self._preempted_req_ids: set[str] = set()
        # Ends that no step produced; they leave with the next step's outputs.
        self._pending_outputs: list[EngineCoreOutput] = []
        self._counters = SchedulerCounters()

    # -- requests in and out ---------------------------------------------------------------------------------------
    def add_request(self, request: Request) -> None:
        """Queue a request. One that can never run (see `capacity_tokens`) ends with "error" in the next step.

        Raises:
            InvalidRequestError: its id is in use.
        """
        request_id = request.request_id
        if request_id in self.requests or request_id in self.transfers.held_request_ids:
            raise InvalidRequestError(f"request id {request_id!r} is in use; give each request its own")
        self.requests[request_id] = request
        self.waiting.add_request(request)
        if not 1 <= request.num_prompt_tokens <= min(self.max_model_len, self.capacity_tokens):
            self._fail(request, f"its prompt has {request.num_prompt_tokens} tokens")

    def finish_requests(self, request_ids: Iterable[str], status: RequestStatus) -> None:
        """End requests in whatever state they are, without an output; unknown ids are ignored."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._finish(request, status)

    @property
    def capacity_tokens(self) -> int:
        """The longest request, prompt and output, that the block pool can ever hold."""
        return self.kv_cache_manager.capacity_tokens

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    @property
    def has_pending_transfers(self) -> bool:
        """Whether blocks are kept or requests wait for the connector."""
        return bool(self.transfers.num_loading or self.transfers.held_request_ids)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: also one that only tells the runner who finished, or polls transfers."""
        return bool(self.requests or self._finished_req_ids or self._pending_outputs or self.transfers.held_request_ids)

    # -- a step ----------------------------------------------------------------------------------------------------
    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens and give them slots; counts them as computed from here on."""
        step = _Step(token_budget=self.scheduler_config.max_num_batched_tokens)
        self._schedule_running(step)
        if not step.has_preempted:
            self._schedule_waiting(step)
        output = SchedulerOutput(
            scheduled_new_reqs=step.new,
            scheduled_cached_reqs=step.cached,
            num_scheduled_tokens=step.num_scheduled_tokens,
            total_num_scheduled_tokens=sum(step.num_scheduled_tokens.values()),
            finished_req_ids=self._finished_req_ids,
            preempted_req_ids=self._preempted_req_ids,
        )
        self._finished_req_ids, self._preempted_req_ids = set(), set()
        if self.connector is not None:
            output = replace(output, kv_connector_metadata=self.connector.build_connector_meta(output))
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += num_tokens
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, runner_output: ModelRunnerOutput
    ) -> list[EngineCoreOutput]:
        """Take in a step's result: transfers that failed or ended, sampled tokens, stops.

        A partial prefill emits nothing.
        """
        rewound: set[str] = set()
        if runner_output.kv_connector_output is not None:
            rewound = self._update_from_transfers(runner_output.kv_connector_output)
        for data in scheduler_output.scheduled_new_reqs:
            if (request := self.requests.get(data.req_id)) is not None:
                self._counters.count_prefix_hits(
                    request,
                    has_prefix_cache=self.kv_cache_manager.enable_caching,
                    has_connector=self.connector is not None,
                )
        outputs, self._pending_outputs = self._pending_outputs, []
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is None or request_id in rewound:
                continue  # ended by a failed load, or its tokens were computed from one
            if request.num_computed_tokens < request.num_tokens:
                continue
            (token_id,) = runner_output.sampled_token_ids[request_id]
            request.append_output_token_ids([token_id])
            if request.check_stop(self.max_model_len, runner_output.grammar_ends.get(request_id)):
                self._finish(request, request.status)
            elif request.num_tokens > self.capacity_tokens:
                # Even alone it would be preempted for ever. A max_model_len within the capacity rules this out.
                self._log_failure(request, "it outgrew the block pool")
                self._finish(request, RequestStatus.FINISHED_ERROR)
            outputs.append(_make_output(request, [token_id], runner_output))
        if not self.requests and not self.transfers.held_request_ids:
            assert self.kv_cache_manager.usage == 0, "blocks leaked"
        return outputs

    def make_stats(self) -> SchedulerStats:
        """Sizes now, counters since the start."""
        return self._counters.snapshot(len(self.running), len(self.waiting), self.kv_cache_manager)

    # -- scheduling ------------------------------------------------------------------------------------------------
    def _schedule_running(self, step: _Step) -> None:
        index = 0
        while index < len(self.running) and step.token_budget > 0:
            request = self.running[index]
            num_new_tokens = min(request.num_tokens - request.num_computed_tokens, step.token_budget)
            assert num_new_tokens > 0, f"{request.request_id} runs with nothing to compute"
            new_blocks = self._allocate_or_preempt(request, num_new_tokens, step)
            if new_blocks is None:
                break  # it was the last and gave way itself
            step.add(request, num_new_tokens)
            new_block_ids = new_blocks.get_block_ids()[0]
            step.cached.append(CachedRequestData.from_request(request, new_block_ids, resumed=False))
            index += 1

    def _allocate_or_preempt(self, request: Request, num_new_tokens: int, step: _Step) -> KVCacheBlocks | None:
        """Slots for a running request, at the cost of those behind it; None when it had to give way itself."""
        while True:
            new_blocks = self.kv_cache_manager.allocate_slots(request, num_new_tokens)
            if new_blocks is not None:
                return new_blocks
            if self._reclaim_from_waiting():
                continue
            # FCFS: the last of the running is this one or comes after it, so it has not been scheduled in this step.
            victim = self.running.pop()
            self._preempt(victim)
            step.has_preempted = True
            if victim is request:
                return None

    def _preempt(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._counters.num_preemptions += 1
        self._preempted_req_ids.add(request.request_id)
        self.waiting.prepend_requests([request])

    def _reclaim_from_waiting(self, spare: Request | None = None) -> bool:
        """Take the blocks of the last waiting request that holds any (its load has ended): it starts over.

        Without this, requests that each hold what they loaded and miss the rest could wait for each other for ever.
        """
        for request in reversed(list(self.waiting)):
            if request is spare or self.transfers.is_loading(request):
                continue
            if self.kv_cache_manager.holds_blocks(request.request_id):
                self.kv_cache_manager.free(request)
                request.num_computed_tokens = 0
                request.forget_cached_tokens(0)
                return True
        return False

    def _schedule_waiting(self, step: _Step) -> None:
        skipped: list[Request] = []
        while self.waiting and step.token_budget > 0 and len(self.running) < self.scheduler_config.max_num_seqs:
            request = self.waiting.peek_request()
            admission = self._admit(request, step)
            if admission is _Admission.NO_ROOM:
                if self.running:
                    break  # who runs will free blocks
                if self._reclaim_from_waiting(spare=request):
                    continue
                # Else all blocks are free, and requests that no pool of this size can hold were ended before.
                assert self.has_pending_transfers, f"{request.request_id} does not fit an empty pool"
            if admission in (_Admission.NO_ROOM, _Admission.OVER_BUDGET):
                break
            self.waiting.pop_request()
            if admission is _Admission.SKIPPED:
                skipped.append(request)
        self.waiting.prepend_requests(skipped)

    def _admit(self, request: Request, step: _Step) -> _Admission:
        if self.transfers.is_loading(request):
            return _Admission.SKIPPED
        local, num_local, external = KVCacheBlocks(), 0, ExternalHit()
        if not self.kv_cache_manager.holds_blocks(request.request_id):  # else it comes from a load, with its blocks
            local, num_local = self.kv_cache_manager.get_computed_blocks(request)
            found = self.transfers.match(request, num_local)
            if found is None:
                return _Admission.SKIPPED
            external = found
        num_computed = request.num_computed_tokens + num_local + external.num_tokens
        num_new_tokens = 0 if external.is_async else request.num_tokens - num_computed
        if num_new_tokens > step.token_budget and not self.scheduler_config.enable_chunked_prefill:
            return _Admission.OVER_BUDGET
        num_new_tokens = min(num_new_tokens, step.token_budget)
        new_blocks = self.kv_cache_manager.allocate_slots(
            request, num_new_tokens, num_local, local, external.num_tokens, delay_cache_blocks=external.is_async
        )
        if new_blocks is None:
            return _Admission.NO_ROOM
        self.transfers.on_allocated(request, external)
        num_cached = min(num_computed, request.num_tokens - 1)
        request.note_cached_tokens(num_cached, min(external.num_tokens, num_cached - num_local))
        request.num_computed_tokens = num_computed
        if external.is_async:
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
            return _Admission.SKIPPED
        self._run(request, num_new_tokens, step)
        return _Admission.ADMITTED

    def _run(self, request: Request, num_new_tokens: int, step: _Step) -> None:
        block_ids = self.kv_cache_manager.get_block_ids(request.request_id)
        if request.was_scheduled:
            step.cached.append(CachedRequestData.from_request(request, block_ids, resumed=True))
        else:
            step.new.append(NewRequestData.from_request(request, block_ids))
        request.was_scheduled = True
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        step.add(request, num_new_tokens)

    # -- ends and transfers ----------------------------------------------------------------------------------------
    def _finish(self, request: Request, status: RequestStatus) -> None:
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove_request(request)
        request.status = status
        del self.requests[request.request_id]
        self._finished_req_ids.add(request.request_id)
        self.transfers.release(request)

    def _fail(self, request: Request, why: str) -> None:
        self._log_failure(request, why)
        self._finish(request, RequestStatus.FINISHED_ERROR)
        self._pending_outputs.append(_make_output(request, []))

    def _log_failure(self, request: Request, why: str) -> None:
        logger.error(
            "request failed request_id=%s: %s; max_model_len=%d, block pool capacity=%d tokens",
            request.request_id,
            why,
            self.max_model_len,
            self.capacity_tokens,
        )

    def _update_from_transfers(self, report: KVConnectorOutput) -> set[str]:
        """Take in the worker's report; returns the ids whose tokens of this step are worthless."""
        rewound: set[str] = set()
        if report.invalid_block_ids:
            rewound = self._handle_load_failures(report.invalid_block_ids)
        for request_id in self.transfers.on_worker_report(report):
            request = self.requests[request_id]
            request.status = RequestStatus.PREEMPTED if request.was_scheduled else RequestStatus.WAITING
            # What failed to load is given back only now: the load was still writing there.
            self.kv_cache_manager.truncate(request, cdiv(request.num_computed_tokens, self.block_size))
            if request.num_computed_tokens == request.num_tokens:
                # A step must yield logits: compute the last token again. Its block stays unhashed until then.
                request.num_computed_tokens -= 1
            self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        return rewound

    def _handle_load_failures(self, invalid_block_ids: set[int]) -> set[str]:
        """Let every request that a failed load touches go on from its first bad block."""
        failures = self.transfers.find_load_failures(invalid_block_ids, self.requests.values())
        affected = [self.requests[request_id] for request_id in self.requests if request_id in failures.first_bad_block]
        for request in affected:  # all, before any of the blocks is given up
            self.kv_cache_manager.evict_from(request, failures.first_bad_block[request.request_id])
        to_rewind: list[Request] = []
        for request in affected:
            first_bad = failures.first_bad_block[request.request_id]
            is_direct = request.request_id in failures.direct
            request.kv_load_failed |= is_direct
            request.num_computed_tokens = min(request.num_computed_tokens, first_bad * self.block_size)
            request.forget_cached_tokens(request.num_computed_tokens)
            if is_direct and self.transfers.failure_policy == "fail":
                self._fail(request, "its KV could not be loaded")
            elif not self.transfers.is_loading(request):
                self.kv_cache_manager.truncate(request, first_bad)
                if request.status is RequestStatus.RUNNING:
                    to_rewind.append(request)
        for request in to_rewind:
            self.running.remove(request)
            request.status = RequestStatus.PREEMPTED
            self._preempted_req_ids.add(request.request_id)
        self.waiting.prepend_requests(to_rewind)
        logger.warning("KV load failed num_blocks=%d num_requests=%d", len(invalid_block_ids), len(affected))
        return {request.request_id for request in affected}


def _make_output(
    request: Request, new_token_ids: list[int], runner_output: ModelRunnerOutput | None = None
) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=new_token_ids,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        num_cached_tokens=request.num_cached_tokens or 0,
        num_external_cached_tokens=request.num_external_cached_tokens,
        new_logprobs=runner_output.logprobs.get(request.request_id) if runner_output else None,
        new_prompt_logprobs=runner_output.prompt_logprobs.get(request.request_id) if runner_output else None,
    )
