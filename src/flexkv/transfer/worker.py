"""The contract of a worker: who copies along one path (host <-> device, host <-> SSD, host <-> remote)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from flexkv.common.transfer import TransferOp


@dataclass(frozen=True, slots=True)
class OpResult:
    """How an op ended.

    Attributes:
        error: why, when it is not ok.
        is_data_bad: not ok, and the stored blocks are suspect: they shall not be served again.
    """

    op_id: int
    ok: bool
    error: str = ""
    is_data_bad: bool = False


@dataclass(frozen=True, slots=True)
class ScheduledOp:
    """An op whose predecessors have all succeeded.

    Attributes:
        op: bound on both sides.
        task_id: the task its graph belongs to.
        num_task_ops: ops of the same graph that take the same kind of worker, this one included.
        timeout_s: after this long without having begun, the op is given up.
    """

    op: TransferOp
    task_id: int
    num_task_ops: int
    timeout_s: float


ReportResult = Callable[[OpResult], None]
"""Takes a result; called from the worker's threads, never blocks."""


class TransferWorker(ABC):
    """Runs ops of one path.

    Every op submitted is reported exactly once, and only when nothing touches its blocks any more: until then the
    store keeps them reserved. `submit` and `cancel` never block and are called by one thread, the transfer engine's.
    """

    @abstractmethod
    def start(self, report: ReportResult) -> None:
        """Begin to take ops; their results go to `report`."""

    @abstractmethod
    def submit(self, scheduled: ScheduledOp) -> None:
        """Take an op. One that cannot be run is reported as failed, not raised."""

    @abstractmethod
    def cancel(self, op_id: int) -> None:
        """Give up an op that has not begun (it is reported as failed); one that has begun runs to its end."""

    def abandon(self, task_id: int) -> None:  # noqa: B027  most workers keep nothing per task
        """Hear that an op of this task, never submitted, will not come: what had to precede it failed."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and report every op that is left as failed. Idempotent."""
