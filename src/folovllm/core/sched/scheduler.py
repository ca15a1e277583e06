"""Which tokens of which requests the next step computes. Mirrors vllm/v1/core/sched/{scheduler,async_scheduler}.py.

    add_request -> waiting --admit--> running --stop, abort--> finished
                    ^   |               |
                    |   +--load starts--+--no room: preempt, load failed: rewind--+
                    |   v                                                         |
                    +-- WAITING_FOR_REMOTE_KVS                                    |
                    +-------------------------------------------------------------+

Each step is `schedule()`, the model, `update_from_output()`; one thread does all three. The parts of `schedule` are in
`running` and `admission`, what they share in `state`.

**Several steps in flight.** `schedule` may be called again before the results of earlier steps are in: what those will
sample is counted (`num_output_placeholders`), and the model runner, which has the tokens, puts them in itself. Steps
run, and their results come back, in order. Three rules keep everything else as if each step were waited for:

1. A request in flight is not preempted. Who needs its blocks waits for a step (`running`).
2. A request that ends while a later step computes it leaves when that step is in; the step's token for it is dropped.
   So no block changes hands under a step that writes it, and a connector is never asked to save one.
3. A failed load is dealt with when no step computes what it concerns (`load_reports`).

A block is offered for reuse once all its tokens are known and the step that computes the last of them is scheduled: a
step that hits it is that one (see `KVCacheManager`) or a later one, and finds it computed.
"""

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from folovllm.config import CacheConfig, SchedulerConfig
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_connector import KVConnector
from folovllm.core.sched.admission import schedule_waiting
from folovllm.core.sched.kv_transfer import KVTransfers
from folovllm.core.sched.load_reports import LoadReports
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.core.sched.request_queue import RequestQueue, create_request_queue
from folovllm.core.sched.running import schedule_running
from folovllm.core.sched.state import SchedulerState, make_output
from folovllm.core.sched.step import StepBuilder, StepInFlight
from folovllm.engine.messages import EngineCoreOutput, SchedulerStats
from folovllm.errors import InvalidRequestError
from folovllm.request import Request, RequestStatus

logger = logging.getLogger(__name__)


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
        self.kv_cache_manager = KVCacheManager(
            cache_config.num_kv_blocks,
            cache_config.block_size,
            enable_caching=cache_config.enable_prefix_caching,
            enable_kv_cache_events=enable_kv_cache_events,
        )
        self.capacity_tokens = self.kv_cache_manager.capacity_tokens
        """The longest request, prompt and output, that the block pool can ever hold."""
        self.connector = connector
        self.transfers = KVTransfers(connector, self.kv_cache_manager, kv_load_failure_policy)
        waiting = create_request_queue(scheduler_config.policy)
        self._state = SchedulerState(scheduler_config, max_model_len, self.kv_cache_manager, self.transfers, waiting)
        self._reports = LoadReports(self._state)
        self._in_flight: deque[StepInFlight] = deque()
        # First scheduled, and their hits are not counted yet.
        self._uncounted: list[Request] = []

    # -- requests in and out ---------------------------------------------------------------------------------------
    def add_request(self, request: Request) -> None:
        """Queue a request. One that can never run (see `capacity_tokens`) ends with "error" in the next step.

        Raises:
            InvalidRequestError: its id is in use, or it has a priority and the policy heeds none.
        """
        request_id, state = request.request_id, self._state
        if request_id in state.requests or request_id in state.leaving or request_id in self.transfers.held_request_ids:
            raise InvalidRequestError(f"request id {request_id!r} is in use; give each request its own")
        if request.priority and self.scheduler_config.policy != "priority":
            raise InvalidRequestError(
                f"request {request_id!r} has priority={request.priority}; the scheduling policy is "
                f"{self.scheduler_config.policy!r}, priorities need 'priority'"
            )
        state.requests[request_id] = request
        state.waiting.add_request(request)
        if not 1 <= request.num_prompt_tokens <= min(self.max_model_len, self.capacity_tokens):
            state.fail(request, f"its prompt has {request.num_prompt_tokens} tokens")

    def finish_requests(self, request_ids: Iterable[str], status: RequestStatus) -> None:
        """End requests in whatever state they are, without an output; unknown ids are ignored."""
        for request_id in request_ids:
            request = self._state.requests.get(request_id)
            if request is not None:
                self._state.finish(request, status)

    @property
    def requests(self) -> dict[str, Request]:
        """Unfinished requests, in the order of arrival."""
        return self._state.requests

    @property
    def waiting(self) -> RequestQueue:
        """Of these, those that do not run; in the order of admission."""
        return self._state.waiting

    @property
    def running(self) -> list[Request]:
        """Of these, those that run; the last is preempted first."""
        return self._state.running

    @property
    def leaving(self) -> dict[str, Request]:
        """Finished requests that a step in flight still computes."""
        return self._state.leaving

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._state.requests)

    @property
    def has_pending_transfers(self) -> bool:
        """Whether blocks are kept or requests wait for the connector."""
        return self.transfers.has_pending

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: also one that only tells the runner who finished, or polls transfers."""
        state = self._state
        return bool(
            state.requests or state.finished_req_ids or state.pending_outputs or self.transfers.held_request_ids
        )

    # -- a step ----------------------------------------------------------------------------------------------------
    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens and give them slots; counts them as computed from here on.

        A step that is not empty must be run, and its result given to `update_from_output`, in order.
        """
        state = self._state
        step = StepBuilder(self.scheduler_config.max_num_batched_tokens)
        if not state.is_draining:
            schedule_running(state, step)
            if not step.is_short_of_room:
                schedule_waiting(state, step)
        output = step.build(state.finished_req_ids, state.preempted_req_ids)
        state.finished_req_ids, state.preempted_req_ids = set(), set()
        if self.connector is not None:
            output = replace(output, kv_connector_metadata=self.connector.build_connector_meta(output))
        if step.requests:
            self._in_flight.append(StepInFlight.launch(output, step.requests))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, runner_output: ModelRunnerOutput
    ) -> list[EngineCoreOutput]:
        """Take in a step's result: transfers that failed or ended, sampled tokens, stops.

        A partial prefill emits nothing.
        """
        state = self._state
        sampling = self._land(scheduler_output)
        worthless = self._reports.take(runner_output.kv_connector_output)
        self._count_prefix_hits(scheduler_output)
        outputs, state.pending_outputs = state.pending_outputs, []
        sampled = runner_output.sampled_token_ids
        for request in sampling:
            if request.is_finished or request.request_id in worthless:
                continue  # it ended before this step was in; or it was computed from a load that failed
            new_token_ids = sampled[request.request_id]
            self._append_tokens(request, new_token_ids, runner_output)
            outputs.append(make_output(request, new_token_ids, runner_output))
        state.release_leaving()
        if not state.requests and not state.leaving and not self.transfers.held_request_ids:
            assert self.kv_cache_manager.usage == 0, "blocks leaked"
        return outputs

    def make_stats(self) -> SchedulerStats:
        """Sizes now, counters since the start."""
        return self._state.counters.snapshot(len(self.running), len(self.waiting), self.kv_cache_manager)

    # -- inside ----------------------------------------------------------------------------------------------------
    def _land(self, scheduler_output: SchedulerOutput) -> list[Request]:
        """The step is no longer in flight; returns the requests that it sampled a token of."""
        if not scheduler_output.num_scheduled_tokens:
            return []
        step = self._in_flight.popleft()
        assert step.output is scheduler_output, "results come in the order of their steps"
        step.land()
        return step.sampling

    def _append_tokens(self, request: Request, token_ids: list[int], runner_output: ModelRunnerOutput) -> None:
        state, request_id, ends = self._state, request.request_id, runner_output.grammar_ends
        request.append_output_token_ids(token_ids)
        request.num_output_placeholders -= 1
        if request.check_stop(self.max_model_len, ends.get(request_id) if ends else None):
            state.finish(request, request.status)
        elif (num_tokens := request.num_tokens) > self.capacity_tokens:
            # Even alone it would be preempted for ever. A max_model_len within the capacity rules this out.
            state.log_failure(request, "it outgrew the block pool")
            state.finish(request, RequestStatus.FINISHED_ERROR)
        elif request.num_computed_tokens >= num_tokens:
            # A step in flight computes this token already; when it was scheduled the block had no hash yet.
            self.kv_cache_manager.cache_blocks(request, num_tokens)

    def _count_prefix_hits(self, scheduler_output: SchedulerOutput) -> None:
        """Count the hits of who was new in this step, once it is known which of its loads failed."""
        for data in scheduler_output.scheduled_new_reqs:
            if (request := self.requests.get(data.req_id)) is not None:
                self._uncounted.append(request)
        if self._state.is_draining:
            return
        for request in [request for request in self._uncounted if not request.is_finished]:
            self._state.counters.count_prefix_hits(
                request,
                has_prefix_cache=self.kv_cache_manager.enable_caching,
                has_connector=self.connector is not None,
            )
        self._uncounted.clear()
