"""The life of a task, and what its caller is told.

UNREADY --launch--> READY --dispatch--> RUNNING --> COMPLETED | FAILED
   `-------- cancel --------------------------------> CANCELLED
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, NewType

from flexkv.errors import CacheStateError

TaskId = NewType("TaskId", int)


class TaskState(enum.Enum):
    """Where a task is in its life; see `TRANSITIONS`."""

    UNREADY = "unready"
    """Planned; its device slots are not known yet."""
    READY = "ready"
    """Slots known, on its way to the transfer engine."""
    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


TRANSITIONS: Final = {
    TaskState.UNREADY: {TaskState.READY, TaskState.COMPLETED, TaskState.CANCELLED, TaskState.FAILED},
    TaskState.READY: {TaskState.RUNNING, TaskState.CANCELLED, TaskState.FAILED},
    TaskState.RUNNING: {TaskState.COMPLETED, TaskState.CANCELLED, TaskState.FAILED},
    TaskState.COMPLETED: set[TaskState](),
    TaskState.CANCELLED: set[TaskState](),
    TaskState.FAILED: set[TaskState](),
}
"""The states each state may be followed by."""


def next_state(current: TaskState, wanted: TaskState) -> TaskState:
    """Return `wanted`.

    Raises:
        CacheStateError: a task in `current` cannot go there.
    """
    if wanted not in TRANSITIONS[current]:
        raise CacheStateError(f"a task cannot go from {current.value} to {wanted.value}")
    return wanted


class ResponseStatus(enum.Enum):
    """What became of a task, as its caller sees it."""

    SUCCESS = "success"
    NOT_FOUND = "not_found"
    """No such task, or (get) nothing of the sequence is stored."""
    UNREADY = "unready"
    """Planned but not launched."""
    TIMEOUT = "timeout"
    """Not over when the caller stopped waiting; it goes on."""
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class KVResponse:
    """The answer for one task.

    Attributes:
        task_id: the task.
        status: what became of it.
        num_blocks: blocks it covered: loaded or stored when `status` is success.
        error: why it failed, else empty.
    """

    task_id: int
    status: ResponseStatus
    num_blocks: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the caller's data is where it asked for it."""
        return self.status is ResponseStatus.SUCCESS
