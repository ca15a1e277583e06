"""Who of the waiting requests runs from this step on. Mirrors the second loop of vLLM's `Scheduler.schedule`.

waiting --local hit--> connector's hit --allocate--> running
                              |          +--> load starts: WAITING_FOR_REMOTE_KVS, stays in the queue
                              +--> not known yet: stays in the queue
"""

import enum
import time

from folovllm.core.kv_cache_manager import KVCacheBlocks
from folovllm.core.sched.kv_transfer import ExternalHit
from folovllm.core.sched.output import CachedRequestData, NewRequestData
from folovllm.core.sched.running import reclaim_from_waiting
from folovllm.core.sched.state import SchedulerState
from folovllm.core.sched.step import StepBuilder
from folovllm.request import Request, RequestStatus


class _Admission(enum.Enum):
    ADMITTED = enum.auto()
    SKIPPED = enum.auto()
    """It waits for a load, or for the connector's answer; others may go first."""
    OVER_BUDGET = enum.auto()
    NO_ROOM = enum.auto()


def schedule_waiting(state: SchedulerState, step: StepBuilder) -> None:
    """Admit requests in the queue's order until the budget, the seats or the blocks are used up."""
    skipped: list[Request] = []
    while state.waiting and step.token_budget > 0 and len(state.running) < state.config.max_num_seqs:
        request = state.waiting.peek_request()
        admission = _admit(state, request, step)
        if admission is _Admission.NO_ROOM:
            if state.running or state.leaving:
                break  # they will free blocks
            if reclaim_from_waiting(state, spare=request):
                continue
            # Else all blocks are free, and requests that no pool of this size can hold were ended before.
            assert state.transfers.has_pending, f"{request.request_id} does not fit an empty pool"
        if admission in (_Admission.NO_ROOM, _Admission.OVER_BUDGET):
            break
        state.waiting.pop_request()
        if admission is _Admission.SKIPPED:
            skipped.append(request)
        else:
            state.start(request)
    state.waiting.prepend_requests(skipped)


def _admit(state: SchedulerState, request: Request, step: StepBuilder) -> _Admission:
    if state.transfers.is_loading(request):
        return _Admission.SKIPPED
    local, num_local, external = KVCacheBlocks(), 0, ExternalHit()
    if not state.manager.holds_blocks(request.request_id):  # else it comes from a load, with its blocks
        local, num_local = state.manager.get_computed_blocks(request)
        found = state.transfers.match(request, num_local)
        if found is None:
            return _Admission.SKIPPED
        external = found
    num_computed = request.num_computed_tokens + num_local + external.num_tokens
    num_new_tokens = 0 if external.is_async else request.num_tokens - num_computed
    num_new_tokens = min(num_new_tokens, state.config.long_prefill_token_threshold or num_new_tokens)
    if num_new_tokens > step.token_budget and not state.config.enable_chunked_prefill:
        return _Admission.OVER_BUDGET
    num_new_tokens = min(num_new_tokens, step.token_budget)
    new_blocks = state.manager.allocate_slots(
        request, num_new_tokens, num_local, local, external.num_tokens, delay_cache_blocks=external.is_async
    )
    if new_blocks is None:
        return _Admission.NO_ROOM
    state.transfers.on_allocated(request, external)
    num_cached = min(num_computed, request.num_tokens - 1)
    request.note_cached_tokens(num_cached, min(external.num_tokens, num_cached - num_local))
    request.num_computed_tokens = num_computed
    if external.is_async:
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        return _Admission.SKIPPED
    block_ids = state.manager.get_block_ids(request.request_id)
    if request.was_scheduled:
        step.add(request, num_new_tokens, CachedRequestData.from_request(request, block_ids, resumed=True))
    else:
        step.add(request, num_new_tokens, NewRequestData.from_request(request, block_ids))
        request.was_scheduled, request.scheduled_time = True, time.monotonic()
    return _Admission.ADMITTED
