"""What a device worker knows of each task: the gate its ops wait at, and how it ended for the engine beside it.

    ops arrive ----> held ----> runnable ----> running ----> ended
    engine releases ---'          (deadline passed, op cancelled, or store lost: ended as failed, later ops refused)

The engine owns its blocks again only when its task has ended here: an op that comes too late is refused, never run.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from flexkv.common.transfer import BlockIds
from flexkv.transfer.worker import OpResult, ReportResult

_MOST_FENCED: Final = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class CopyJob:
    """One device op of this rank: copy block i of one side to block i of the other.

    Attributes:
        num_task_ops: device ops of its task.
        num_layers: None for all from `first_layer` on.
        deadline: time.monotonic() after which it no longer begins.
    """

    op_id: int
    task_id: int
    num_task_ops: int
    to_device: bool
    device_blocks: BlockIds
    pool_blocks: BlockIds
    first_layer: int
    num_layers: int | None
    deadline: float


@dataclass(slots=True)
class _Task:
    deadline: float
    is_released: bool = False
    num_ended: int = 0
    error: str = ""
    held: list[CopyJob] = field(default_factory=list)
    running: set[int] = field(default_factory=set)


class DeviceTasks:
    """The tasks of one device worker. Thread-safe: the engine releases and polls, the socket thread brings ops, the
    copy thread takes them. Results of ops go to `report` outside the lock.

    With `gated`, ops wait for `release` and ends are kept for `take_ended`; without, ops run as they come.
    """

    def __init__(self, report: ReportResult, *, gated: bool) -> None:
        """Start with no tasks; every op that ends here goes to `report`."""
        self._report = report
        self._gated = gated
        self._changed = threading.Condition()
        # Protected by _changed:
        self._tasks: dict[int, _Task] = {}
        self._runnable: deque[CopyJob] = deque()
        self._ended: dict[int, str] = {}
        self._fenced: OrderedDict[int, None] = OrderedDict()
        self._closed = False

    # -- the engine ------------------------------------------------------------------------------------------------
    def release(self, task_ids: Iterable[int], timeout_s: float) -> None:
        """Let the ops of these tasks run; those that have not begun after `timeout_s` fail the task."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            for task_id in task_ids:
                if task_id in self._fenced or self._closed:
                    self._ended[task_id] = "the store gave it up"
                    continue
                task = self._tasks.setdefault(task_id, _Task(deadline))
                task.is_released, task.deadline = True, deadline
                self._runnable.extend(task.held)
                task.held.clear()
            self._changed.notify_all()

    def take_ended(self) -> dict[int, str]:
        """Return the released tasks that ended since the last call, each with its error, empty if it succeeded."""
        self.expire()
        with self._changed:
            ended, self._ended = self._ended, {}
        return ended

    # -- the store -------------------------------------------------------------------------------------------------
    def add(self, job: CopyJob) -> None:
        """Take an op; it is reported exactly once."""
        with self._changed:
            refused = job.task_id in self._fenced or self._closed
            if not refused:
                task = self._tasks.setdefault(job.task_id, _Task(job.deadline, is_released=not self._gated))
                if task.is_released:
                    self._runnable.append(job)
                    self._changed.notify()
                else:
                    task.held.append(job)
        if refused:
            self._report(OpResult(job.op_id, False, "the device worker no longer expects it"))

    def cancel(self, op_ids: set[int]) -> None:
        """Drop the ops that have not begun, which fails their tasks."""
        with self._changed:
            waiting = [*self._runnable, *(job for task in self._tasks.values() for job in task.held)]
            task_ids = {job.task_id for job in waiting if job.op_id in op_ids}
        self.abandon(task_ids, "cancelled")

    def abandon(self, task_ids: Iterable[int], reason: str) -> None:
        """Fail tasks: ops that have not begun are dropped, later ones refused; one that has begun ends first."""
        with self._changed:
            dropped = [op for task_id in task_ids for op in self._fail(task_id, reason)]
        self._report_dropped(dropped, reason)

    def expire(self) -> None:
        """Fail the tasks whose deadline has passed and of which no op is running."""
        now = time.monotonic()
        with self._changed:
            overdue = [t for t, task in self._tasks.items() if task.deadline <= now and not task.running]
            dropped = [op for task_id in overdue for op in self._fail(task_id, "deadline passed")]
        self._report_dropped(dropped, "deadline passed")

    def fail_all(self, reason: str) -> None:
        """Fail every task, the store being gone."""
        with self._changed:
            task_ids = list(self._tasks)
        self.abandon(task_ids, reason)

    def start_over(self, reason: str) -> None:
        """Fail every task and forget them: another store, which counts its tasks anew, takes the place of the old."""
        self.fail_all(reason)
        with self._changed:  # a task whose copy is running stays fenced: its number is taken until that ends
            self._fenced = OrderedDict((task_id, None) for task_id in self._fenced if task_id in self._tasks)

    def close(self) -> None:
        """Fail every task, refuse all later ops and let the copy thread end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.fail_all("the device worker closes")

    # -- the copy thread -------------------------------------------------------------------------------------------
    def take(self) -> CopyJob | None:
        """Return the next op to run, waiting for one; None once closed."""
        with self._changed:
            while not self._runnable and not self._closed:
                self._changed.wait()  # for work, or for `close`, which the client calls whatever happens to it
            if self._closed:
                return None
            job = self._runnable.popleft()
            self._tasks[job.task_id].running.add(job.op_id)
            return job

    def finish(self, job: CopyJob, error: str) -> None:
        """An op taken has ended; `error` is empty if it succeeded."""
        with self._changed:
            task = self._tasks[job.task_id]
            task.running.discard(job.op_id)
            task.num_ended += 1
            task.error = task.error or error
            if job.task_id in self._fenced or task.num_ended == job.num_task_ops:
                self._end(job.task_id, task)
        self._report(OpResult(job.op_id, not error, error, is_data_bad=bool(error)))

    # -- under the lock --------------------------------------------------------------------------------------------
    def _fail(self, task_id: int, reason: str) -> list[int]:
        """Fence a task and return its ops dropped; its end comes at once, or with its last running op."""
        self._fenced[task_id] = None
        if len(self._fenced) > _MOST_FENCED:
            self._fenced.popitem(last=False)
        task = self._tasks.get(task_id)
        if task is None:
            return []
        dropped = [job.op_id for job in (*task.held, *self._runnable) if job.task_id == task_id]
        self._runnable = deque(job for job in self._runnable if job.task_id != task_id)
        task.held.clear()
        task.error = task.error or reason
        if not task.running:
            self._end(task_id, task)
        return dropped

    def _end(self, task_id: int, task: _Task) -> None:
        del self._tasks[task_id]
        if self._gated and task.is_released:
            self._ended[task_id] = task.error

    def _report_dropped(self, op_ids: list[int], reason: str) -> None:
        for op_id in op_ids:
            self._report(OpResult(op_id, False, reason))
