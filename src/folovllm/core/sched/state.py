"""What the scheduler's parts share: the requests, where each of them stands, and how one leaves.

    requests = waiting + running     unfinished, each in exactly one of the two
    leaving                          finished, but a step in flight still computes them: their blocks are kept
    transfers.held                   finished, but the connector still copies their blocks

vLLM has all of it in `Scheduler`.
"""

import bisect
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from folovllm.config import SchedulerConfig
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.sched.kv_transfer import KVTransfers
from folovllm.core.sched.output import ModelRunnerOutput
from folovllm.core.sched.request_queue import RequestQueue
from folovllm.core.sched.stats import SchedulerCounters
from folovllm.engine.messages import EngineCoreOutput
from folovllm.request import Request, RequestStatus

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SchedulerState:
    """Owned by one Scheduler, used by its thread alone."""

    config: SchedulerConfig
    max_model_len: int
    manager: KVCacheManager
    transfers: KVTransfers
    waiting: RequestQueue
    running: list[Request] = field(default_factory=list)
    """In the order in which they get tokens; the last gives way first. By admission, or under "priority" by rank."""
    requests: dict[str, Request] = field(default_factory=dict)
    """In the order of arrival."""
    leaving: dict[str, Request] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)
    """What the model runner has not been told yet, as are `preempted_req_ids`."""
    preempted_req_ids: set[str] = field(default_factory=set)
    pending_outputs: list[EngineCoreOutput] = field(default_factory=list)
    """Ends that no step produced; they leave with the next step's outputs."""
    is_draining: bool = False
    """A failed load is not dealt with yet (see `load_reports`): nothing is scheduled, no blocks are given up."""
    counters: SchedulerCounters = field(default_factory=SchedulerCounters)

    def start(self, request: Request) -> None:
        """The request, taken out of the queue, runs from now on."""
        request.status = RequestStatus.RUNNING
        if self.config.policy == "priority":
            bisect.insort(self.running, request, key=Request.get_rank)
        else:
            self.running.append(request)

    def put_back(self, requests: Iterable[Request]) -> None:
        """Requests, taken out of `running`, wait again, before all others of their rank. REQUIRES: none in flight."""
        back = list(requests)
        for request in back:
            assert not request.num_steps_in_flight, f"{request.request_id} is in flight"
            request.status = RequestStatus.PREEMPTED
            request.num_output_placeholders = 0
            self.preempted_req_ids.add(request.request_id)
        self.waiting.prepend_requests(back)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request, whatever it is doing; its blocks go when no step in flight and no transfer uses them."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove_request(request)
        request.status = status
        del self.requests[request.request_id]
        self.finished_req_ids.add(request.request_id)
        if request.num_steps_in_flight or self.is_draining:
            self.leaving[request.request_id] = request
        else:
            self.transfers.release(request)

    def release_leaving(self) -> None:
        """Give up the blocks of finished requests that no step in flight computes any more."""
        if not self.leaving or self.is_draining:
            return
        for request in [request for request in self.leaving.values() if not request.num_steps_in_flight]:
            del self.leaving[request.request_id]
            self.transfers.release(request)

    def fail(self, request: Request, why: str) -> None:
        """End a request with an error that no step's output tells of."""
        self.log_failure(request, why)
        self.finish(request, RequestStatus.FINISHED_ERROR)
        self.pending_outputs.append(make_output(request))

    def log_failure(self, request: Request, why: str) -> None:
        """Say why a request ends with an error."""
        logger.error(
            "request failed request_id=%s: %s; max_model_len=%d, block pool capacity=%d tokens",
            request.request_id,
            why,
            self.max_model_len,
            self.manager.capacity_tokens,
        )


def make_output(
    request: Request, new_token_ids: list[int] | None = None, runner_output: ModelRunnerOutput | None = None
) -> EngineCoreOutput:
    """What the front end hears of a request; `runner_output`: of the step that sampled `new_token_ids`."""
    logprobs = prompt_logprobs = None
    if runner_output is not None and (runner_output.logprobs or runner_output.prompt_logprobs):
        logprobs = runner_output.logprobs.get(request.request_id)
        prompt_logprobs = runner_output.prompt_logprobs.get(request.request_id)
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=new_token_ids or [],
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        num_cached_tokens=request.num_cached_tokens or 0,
        num_external_cached_tokens=request.num_external_cached_tokens,
        scheduled_time=request.scheduled_time,
        num_preemptions=request.num_preemptions,
        new_logprobs=logprobs,
        new_prompt_logprobs=prompt_logprobs,
    )
