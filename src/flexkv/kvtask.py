"""The life of tasks: plans become transfers, transfers become answers.

    caller's thread --plan/launch/cancel/wait--> KVTaskEngine <--ends of ops and graphs-- transfer thread

A get may begin a load from a lower tier, which runs at once and belongs to no task: it goes on when the get is
cancelled, and serves others that come meanwhile.

One lock guards the cache engine and the tasks; it is never held while bytes move or anybody waits.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.loads import CacheLoad
from flexkv.cache.plans import CachePlan, CacheStats
from flexkv.common.block import SequenceMeta
from flexkv.common.request import KVResponse, ResponseStatus, TaskState, next_state
from flexkv.common.transfer import BlockContent
from flexkv.errors import InvalidRequestError, TransferError
from flexkv.transfer.transfer_manager import TransferManager
from flexkv.transfer.worker import OpResult
from kvblocks.events import BlockRemoved, BlockStored

logger = logging.getLogger(__name__)

_FINISHED_STATES: Final = {TaskState.COMPLETED, TaskState.CANCELLED, TaskState.FAILED}


@dataclass(slots=True)
class _Task:
    task_id: int
    plan: CachePlan
    state: TaskState = TaskState.UNREADY
    caller_ops: set[int] = field(default_factory=set)  # those that have not ended; of a prefetch its loads
    error: str = ""
    is_over: bool = False
    """Nothing of it runs, and the cache engine has everything back."""

    def response(self) -> KVResponse:
        """What the caller is told at this moment."""
        return KVResponse(self.task_id, self._status(), self.plan.num_blocks, self.error)

    @property
    def is_answered(self) -> bool:
        """Whether the caller's own data is safe, or never will be."""
        return self.state in _FINISHED_STATES or (self.state is TaskState.RUNNING and not self.caller_ops)

    def _status(self) -> ResponseStatus:
        match self.state:
            case TaskState.UNREADY:
                return ResponseStatus.UNREADY
            case TaskState.CANCELLED:
                return ResponseStatus.CANCELLED
            case TaskState.FAILED:
                return ResponseStatus.FAILED
            case _ if not self.is_answered:
                return ResponseStatus.TIMEOUT
            case _ if self.error:
                return ResponseStatus.FAILED
            case _ if self.plan.kind == "get" and self.plan.num_blocks == 0:
                return ResponseStatus.NOT_FOUND
            case _:
                return ResponseStatus.SUCCESS


FindRemotely = Callable[[BlockContent], Future[int]]
"""Asks a store that others share how many of these blocks, from the first on, it has."""

_SEARCH: Final = -1
"""Stands among the ops of a prefetch for its search in the remote store."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prefetch:
    task: _Task
    sequence: SequenceMeta


class KVTaskEngine:
    """Holds the tasks. Thread-safe; nothing but `wait` waits.

    The answers of the last `max_tasks` finished tasks are kept.
    """

    def __init__(
        self,
        cache_engine: GlobalCacheEngine,
        transfer: TransferManager,
        max_tasks: int,
        find_remotely: FindRemotely | None = None,
    ) -> None:
        """Take the control plane, which nobody else may touch, the data plane, and who knows the remote store."""
        self._find_remotely = find_remotely
        self._cache = cache_engine
        self._transfer = transfer
        self._max_tasks = max_tasks
        self._task_ids = itertools.count(1)
        self._changed = threading.Condition()
        # Protected by _changed:
        self._alive: dict[int, _Task] = {}
        self._loads: dict[int, CacheLoad] = {}  # those that run, by ids that no task has
        self._prefetches: dict[int, _Prefetch] = {}  # those of the tasks alive
        self._finished: dict[int, _Task] = {}

    def start(self) -> None:
        """Start the data plane."""
        self._transfer.start(self)

    # -- callers ---------------------------------------------------------------------------------------------------
    def plan_get(self, sequence: SequenceMeta, first_block: int) -> tuple[int, CachePlan | None]:
        """Make a task that loads what is stored from `first_block` on; None when that is nothing."""
        with self._changed:
            if not self._accepts():
                return self._unplanned("get", first_block)
            plan = self._cache.plan_get(sequence, first_block)
            self._begin_loads()
            return self._add(plan)

    def plan_put(self, sequence: SequenceMeta, first_block: int) -> tuple[int, CachePlan | None]:
        """Make a task that stores what is missing from `first_block` on; None when that is nothing, or has no room."""
        with self._changed:
            if not self._accepts():
                return self._unplanned("put", first_block)
            return self._add(self._cache.plan_put(sequence, first_block))

    def prefetch(self, sequence: SequenceMeta) -> int:
        """Make and run a task that brings what lower tiers have of a sequence into the CPU tier.

        Its answer says how many blocks, from the first on, were there in the end.
        """
        with self._changed:
            if not self._accepts():
                return self._unplanned("get", 0)[0]
            task = _Task(next(self._task_ids), CachePlan(0, "get", None, 0, 0))
            task.state = next_state(next_state(task.state, TaskState.READY), TaskState.RUNNING)
            self._alive[task.task_id] = task
            prefetch = self._prefetches[task.task_id] = _Prefetch(task, sequence)
            loads, num_coming = self._cache.plan_prefetch(sequence)
            task.caller_ops |= loads
            self._begin_loads()
            left = sequence.num_blocks - num_coming
            find = self._find_remotely if left > 0 else None
            if find is None:
                self._end_prefetch_if_done(prefetch)
                return task.task_id
            task.caller_ops.add(_SEARCH)
        # Not under the lock, which the answer takes, perhaps at once.
        content = BlockContent.of_run(sequence.block_hashes, num_coming, left, sequence.namespace)
        find(content).add_done_callback(lambda found: self._on_found(prefetch, num_coming, found))
        return task.task_id

    def num_blocks(self, task_id: int) -> int:
        """Return how many blocks a task covers, so many device blocks its launch takes.

        Raises:
            InvalidRequestError: no such task.
        """
        with self._changed:
            return self._find(task_id).plan.num_blocks

    def launch(self, task_id: int, device_blocks: npt.NDArray[np.integer[Any]]) -> None:
        """Run a task, now that its device blocks are known. A task that has nothing to do, or is over, stays so.

        Raises:
            InvalidRequestError: no such task, it was launched before, or not as many blocks as it covers.
        """
        with self._changed:
            task = self._find(task_id)
            if task.state in _FINISHED_STATES:
                return
            if task.state is not TaskState.UNREADY:
                raise InvalidRequestError(f"task {task_id} was launched before")
            assert task.plan.graph is not None
            task.plan.graph.bind_device_blocks(device_blocks)
            self._run(task)

    def cancel(self, task_ids: Iterable[int]) -> None:
        """Cancel tasks, but not finished ones; what a running one holds is freed once its copies have ended."""
        with self._changed:
            for task_id in task_ids:
                task = self._alive.get(task_id)
                if task is None or task.state in _FINISHED_STATES:
                    continue
                if task.state is TaskState.UNREADY:
                    self._end(task, TaskState.CANCELLED)
                    continue
                if task.plan.graph is None:  # a prefetch: what it began goes on
                    self._end(task, TaskState.CANCELLED)
                    continue
                task.state = next_state(task.state, TaskState.CANCELLED)
                self._transfer.cancel(task.plan.graph.graph_id)
            self._changed.notify_all()

    def wait(self, task_ids: Iterable[int], timeout_s: float, completely: bool) -> dict[int, KVResponse]:
        """Wait until every launched task is answered, or with `completely` over; then answer all of them."""
        wanted = list(task_ids)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._has_unfinished(wanted, completely):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return {task_id: self._response(task_id, completely) for task_id in wanted}

    def try_wait(self, task_ids: Iterable[int]) -> dict[int, KVResponse]:
        """Answer those of the tasks that are answered already, or unknown."""
        with self._changed:
            responses = {task_id: self._response(task_id, completely=False) for task_id in task_ids}
        pending = (ResponseStatus.TIMEOUT, ResponseStatus.UNREADY)
        return {task_id: response for task_id, response in responses.items() if response.status not in pending}

    def drain(self, timeout_s: float) -> bool:
        """Wait until no launched task and no load runs; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_running(), timeout_s)

    def reset(self) -> bool:
        """Forget every block; False, changing nothing, while any task or load is alive."""
        with self._changed:
            return not self._alive and not self._loads and self._cache.reset()

    def take_events(self) -> list[BlockStored | BlockRemoved]:
        """Return what the tiers stored and removed since the last call."""
        with self._changed:
            return self._cache.take_events()

    def stats(self) -> CacheStats:
        """Return the cache's counters."""
        with self._changed:
            return self._cache.stats()

    def check_integrity(self) -> None:
        """Check the cache engine's invariants.

        Raises:
            CacheStateError: one is broken.
        """
        with self._changed:
            self._cache.check_integrity()

    def close(self, timeout_s: float) -> None:
        """Cancel every task, wait for running copies, and stop the data plane. Idempotent."""
        with self._changed:
            for load in self._loads.values():
                self._transfer.cancel(load.graph.graph_id)
            task_ids = list(self._alive)
        self.cancel(task_ids)
        self.drain(timeout_s)
        self._transfer.close()

    # -- the transfer thread ---------------------------------------------------------------------------------------
    def on_op_finished(self, task_id: int, result: OpResult) -> None:
        """An op of a task ended: its blocks become ready, or are dropped."""
        with self._changed:
            if (load := self._loads.pop(task_id, None)) is not None:
                self._end_load(load, result)
                return
            task = self._alive[task_id]
            # What a lower tier does not take is no failure of a task whose data is safe.
            if not result.ok and result.op_id in task.plan.caller_op_ids:
                task.error = task.error or result.error or "copy failed"
            # An op that never began leaves what it would have read; releasing the plan rolls back the rest.
            if result.ok or result.is_data_bad:
                self._cache.op_finished(task.plan, result.op_id, result.ok, result.failed)
            task.caller_ops.discard(result.op_id)
            self._changed.notify_all()

    def on_graph_finished(self, task_id: int) -> None:
        """Nothing of a task runs any more."""
        with self._changed:
            if (load := self._loads.pop(task_id, None)) is not None:
                self._end_load(load, OpResult(load.op_id, False))
            task = self._alive.get(task_id)
            if task is None:  # a load's
                return
            if task.caller_ops:
                task.error = task.error or "the transfer engine stopped"
            self._end(task, TaskState.FAILED if task.error else TaskState.COMPLETED, task.error)

    # -- under the lock --------------------------------------------------------------------------------------------
    def _accepts(self) -> bool:
        return len(self._alive) < self._max_tasks and self._transfer.is_alive

    def _add(self, plan: CachePlan) -> tuple[int, CachePlan | None]:
        task = _Task(next(self._task_ids), plan, caller_ops=set(plan.caller_op_ids))
        self._alive[task.task_id] = task
        if plan.graph is None:
            self._end(task, TaskState.COMPLETED)
            return task.task_id, None
        if plan.num_blocks == 0:  # copies between tiers, which need nothing of the caller
            self._run(task)
            return task.task_id, None
        return task.task_id, plan

    def _begin_loads(self) -> None:
        for load in self._cache.take_loads():
            load_id = next(self._task_ids)
            self._loads[load_id] = load
            try:
                self._transfer.submit(load.graph, load_id)
            except TransferError as error:
                logger.warning("a load was not begun error=%s", error)
                del self._loads[load_id]
                self._end_load(load, OpResult(load.op_id, False))

    def _end_load(self, load: CacheLoad, result: OpResult) -> None:
        is_memory_lost = bool(result.retired)
        self._cache.load_finished(load, result.ok, result.failed, result.bad, is_memory_lost=is_memory_lost)
        for prefetch in list(self._prefetches.values()):
            prefetch.task.caller_ops.discard(load.op_id)
            self._end_prefetch_if_done(prefetch)
        self._changed.notify_all()

    def _on_found(self, prefetch: _Prefetch, first_block: int, found: Future[int]) -> None:
        """The remote store has answered, on whatever thread."""
        num_found = 0 if found.exception() is not None else found.result()
        with self._changed:
            task = prefetch.task
            if task.task_id not in self._prefetches:
                return
            if num_found > 0:
                loads, _ = self._cache.begin_remote_load(prefetch.sequence, first_block + num_found)
                task.caller_ops |= loads
                self._begin_loads()
            task.caller_ops.discard(_SEARCH)
            self._end_prefetch_if_done(prefetch)

    def _end_prefetch_if_done(self, prefetch: _Prefetch) -> None:
        task = prefetch.task
        if task.task_id in self._prefetches and not task.caller_ops:
            task.plan = replace(task.plan, num_blocks=self._cache.num_ready(prefetch.sequence))
            self._end(task, TaskState.COMPLETED)

    def _run(self, task: _Task) -> None:
        assert task.plan.graph is not None
        task.state = next_state(task.state, TaskState.READY)
        if self._cache.is_broken(task.plan):
            self._end(task, TaskState.FAILED, "blocks of a lower tier could not be read")
            return
        try:
            self._transfer.submit(task.plan.graph, task.task_id)
        except TransferError as error:
            self._end(task, TaskState.FAILED, str(error))
            return
        task.state = next_state(task.state, TaskState.RUNNING)

    def _unplanned(self, kind: Any, first_block: int) -> tuple[int, CachePlan | None]:
        return self._add(CachePlan(0, kind, None, first_block, 0))

    def _end(self, task: _Task, state: TaskState, error: str = "") -> None:
        """Give back what the task holds; a task cancelled meanwhile stays cancelled."""
        if task.state is not TaskState.CANCELLED:
            task.state = next_state(task.state, state)
        task.error = error
        task.caller_ops.clear()
        task.is_over = True
        if task.plan.graph is not None:
            self._cache.release(task.plan)
        del self._alive[task.task_id]
        self._prefetches.pop(task.task_id, None)
        self._finished[task.task_id] = task
        if len(self._finished) > self._max_tasks:
            del self._finished[next(iter(self._finished))]
        if task.state is TaskState.FAILED:
            logger.warning("task failed task_id=%d kind=%s error=%s", task.task_id, task.plan.kind, error)
        self._changed.notify_all()

    def _find(self, task_id: int) -> _Task:
        task = self._alive.get(task_id) or self._finished.get(task_id)
        if task is None:
            raise InvalidRequestError(f"there is no task {task_id}, or it ended long ago")
        return task

    def _is_running(self) -> bool:
        return bool(self._loads) or any(task.state is not TaskState.UNREADY for task in self._alive.values())

    def _has_unfinished(self, task_ids: list[int], completely: bool) -> bool:
        for task_id in task_ids:
            task = self._alive.get(task_id)
            if task is None or task.state is TaskState.UNREADY:
                continue
            if completely or not task.is_answered:
                return True
        return False

    def _response(self, task_id: int, completely: bool) -> KVResponse:
        task = self._alive.get(task_id) or self._finished.get(task_id)
        if task is None:
            return KVResponse(task_id, ResponseStatus.NOT_FOUND)
        response = task.response()
        if completely and not task.is_over and response.status is not ResponseStatus.UNREADY:
            return KVResponse(task_id, ResponseStatus.TIMEOUT, response.num_blocks)
        return response
