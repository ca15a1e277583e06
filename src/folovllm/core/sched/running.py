"""The next tokens of the requests that run, and who gives way when blocks are short.

Mirrors the first loop of `Scheduler.schedule` in vllm/v1/core/sched/scheduler.py. There the victim of the priority
policy may have been scheduled in the same step already, and gives its tokens back to the budget; here `running` is kept
in the order of rank, so the victim is always the last and has not been served yet.
"""

from folovllm.core.kv_cache_manager import KVCacheBlocks
from folovllm.core.sched.output import CachedRequestData
from folovllm.core.sched.state import SchedulerState
from folovllm.core.sched.step import StepBuilder
from folovllm.request import Request


def schedule_running(state: SchedulerState, step: StepBuilder) -> None:
    """Give running requests tokens in their order, as far as the budget goes."""
    index = 0
    while index < len(state.running) and step.token_budget > 0:
        request = state.running[index]
        num_new_tokens = _num_wanted_tokens(state, request, step.token_budget)
        if num_new_tokens:
            news = None
            if not state.manager.has_slots(request, num_new_tokens):
                new_blocks = _allocate_or_preempt(state, request, num_new_tokens, step)
                if new_blocks is None:
                    return
                if new_blocks.blocks:
                    (block_ids,) = new_blocks.get_block_ids()
                    news = CachedRequestData.from_request(request, block_ids, resumed=False)
            step.add(request, num_new_tokens, news)
        index += 1


def reclaim_from_waiting(state: SchedulerState, spare: Request | None = None) -> bool:
    """Take the blocks of the last waiting request that holds any (its load has ended): it starts over.

    Without this, requests that each hold what they loaded and miss the rest could wait for each other for ever.
    """
    if state.transfers.connector is None:
        return False  # only a load gives blocks to who waits
    for request in reversed(list(state.waiting)):
        if request is spare or state.transfers.is_loading(request):
            continue
        if state.manager.holds_blocks(request.request_id):
            state.manager.free(request)
            request.num_computed_tokens = 0
            request.forget_cached_tokens(0)
            return True
    return False


def _num_wanted_tokens(state: SchedulerState, request: Request, token_budget: int) -> int:
    """Tokens to compute next; 0 when a step in flight samples what must be the request's last token."""
    if request.num_output_placeholders and _ends_with_next_token(state, request):
        return 0
    num_tokens = request.num_tokens_with_placeholders - request.num_computed_tokens
    if num_tokens == 1:
        return 1  # a decode, as most are
    assert num_tokens > 0, f"{request.request_id} runs with nothing to compute"
    return min(num_tokens, token_budget, state.config.long_prefill_token_threshold or num_tokens)


def _ends_with_next_token(state: SchedulerState, request: Request) -> bool:
    num_tokens = request.num_tokens_with_placeholders
    max_tokens = request.sampling_params.max_tokens
    return (
        num_tokens >= state.max_model_len
        or num_tokens > state.manager.capacity_tokens
        or (max_tokens is not None and num_tokens >= request.num_prompt_tokens + max_tokens)
    )


def _allocate_or_preempt(
    state: SchedulerState, request: Request, num_new_tokens: int, step: StepBuilder
) -> KVCacheBlocks | None:
    """Slots for a running request, at the cost of those behind it; None when it must wait or gave way itself."""
    while True:
        new_blocks = state.manager.allocate_slots(request, num_new_tokens)
        if new_blocks is not None:
            return new_blocks
        if reclaim_from_waiting(state):
            continue
        step.is_short_of_room = True
        # This one or one behind it, so it has not been scheduled in this step.
        victim = state.running[-1]
        if victim.num_steps_in_flight:
            # Its blocks are being written, and its next token is on its way. It gets no more tokens in this step, so
            # that it can give way in the next one.
            return None
        state.running.pop()
        _preempt(state, victim)
        if victim is request:
            return None


def _preempt(state: SchedulerState, request: Request) -> None:
    state.manager.free(request)
    request.num_computed_tokens = 0
    request.num_preemptions += 1
    state.counters.num_preemptions += 1
    state.put_back([request])
