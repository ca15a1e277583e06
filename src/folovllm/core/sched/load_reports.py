"""What the connector's worker half reports after a step: loads and saves that ended, loads that failed.

Mirrors `_update_from_kv_xfer_finished` and `_handle_invalid_blocks` of vllm/v1/core/sched/scheduler.py.

With several steps in flight, a failed load may concern requests that a later step computes already. Such a report is
held, and nothing is scheduled, until the last of these steps is in; their tokens are dropped on the way. So nobody is
in flight who must be rewound. Who ends meanwhile keeps its blocks: through them those are found that were computed from
them.
"""

import logging

from folovllm.core.kv_cache_utils import cdiv
from folovllm.core.sched.kv_transfer import LoadFailures
from folovllm.core.sched.output import KVConnectorOutput
from folovllm.core.sched.state import SchedulerState
from folovllm.request import Request, RequestStatus

logger = logging.getLogger(__name__)


class LoadReports:
    """Takes the reports in; used by the scheduler's thread alone."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._held: KVConnectorOutput | None = None

    def take(self, report: KVConnectorOutput | None) -> set[str]:
        """Take in a step's report; returns the ids whose tokens of this step are worthless."""
        state = self._state
        if report is not None and state.transfers.connector is not None:
            state.transfers.connector.update_connector_output(report)
        if self._held is not None:
            report = self._held if report is None else _merge(self._held, report)
            self._held, state.is_draining = None, False
        if report is None:
            return set()
        failures = LoadFailures()
        if report.invalid_block_ids:
            requests = [*state.requests.values(), *state.leaving.values()]
            failures = state.transfers.find_load_failures(report.invalid_block_ids, requests)
            if any(r.num_steps_in_flight for r in requests if r.request_id in failures.first_bad_block):
                self._held, state.is_draining = report, True
                return set(failures.first_bad_block)
            self._recompute(failures, requests)
        for request_id in state.transfers.on_worker_report(report):
            self._end_load(state.requests[request_id])
        return set(failures.first_bad_block)

    def _end_load(self, request: Request) -> None:
        manager = self._state.manager
        request.status = RequestStatus.PREEMPTED if request.was_scheduled else RequestStatus.WAITING
        # What failed to load is given back only now: the load was still writing there.
        manager.truncate(request, cdiv(request.num_computed_tokens, manager.block_size))
        if request.num_computed_tokens == request.num_tokens:
            # A step must yield logits: compute the last token again. Its block stays unhashed until then.
            request.num_computed_tokens -= 1
        manager.cache_blocks(request, request.num_computed_tokens)

    def _recompute(self, failures: LoadFailures, requests: list[Request]) -> None:
        """Let every request that a failed load touches go on from its first bad block."""
        state, block_size = self._state, self._state.manager.block_size
        affected = [request for request in requests if request.request_id in failures.first_bad_block]
        for request in affected:  # all, before any of the blocks is given up
            state.manager.evict_from(request, failures.first_bad_block[request.request_id])
        to_rewind: list[Request] = []
        for request in affected:
            first_bad = failures.first_bad_block[request.request_id]
            is_direct = request.request_id in failures.direct
            request.kv_load_failed |= is_direct
            # Of one that has ended, the connector keeps no more than this.
            request.num_computed_tokens = min(request.num_computed_tokens, first_bad * block_size)
            if request.is_finished:
                continue
            request.forget_cached_tokens(request.num_computed_tokens)
            if is_direct and state.transfers.failure_policy == "fail":
                state.fail(request, "its KV could not be loaded")
            elif not state.transfers.is_loading(request):
                state.manager.truncate(request, first_bad)
                if request.status is RequestStatus.RUNNING:
                    to_rewind.append(request)
        for request in to_rewind:
            state.running.remove(request)
        state.put_back(to_rewind)
        logger.warning("KV load failed num_requests=%d policy=%s", len(affected), state.transfers.failure_policy)


def _merge(earlier: KVConnectorOutput, later: KVConnectorOutput) -> KVConnectorOutput:
    return KVConnectorOutput(
        finished_sending=earlier.finished_sending | later.finished_sending,
        finished_recving=earlier.finished_recving | later.finished_recving,
        invalid_block_ids=earlier.invalid_block_ids | later.invalid_block_ids,
    )
