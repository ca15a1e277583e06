"""The contract of a worker: who copies along one path (host <-> device, host <-> SSD, host <-> remote)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flexkv.common.transfer import BlockIds, TransferOp


@dataclass(frozen=True, slots=True)
class OpResult:
    """How an op ended.

    Block indices are positions in the op, ascending. Those in none of the three have arrived if the op is ok.

    Attributes:
        ok: it was carried out; `failed` says for which blocks in vain. Not ok: no block can be relied on.
        error: why, when it is not ok or some blocks failed.
        is_data_bad: not ok, and the stored blocks are suspect: they shall not be served again.
        failed: blocks that have not arrived: host memory (a load) or the tier (a store) holds garbage or nothing there.
        bad: those of `failed` whose stored copy is damaged or is not what the op asked for: the tier has to drop them.
        retired: those of `failed` whose host memory the system never gave back: it must not be used again, ever.
    """

    op_id: int
    ok: bool
    error: str = ""
    is_data_bad: bool = False
    failed: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    retired: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every block has arrived."""
        return self.ok and not self.failed


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


@dataclass(slots=True)
class PathStats:
    """What a worker has done in one direction; all but the queue's length only grow.

    Attributes:
        num_ops: ops carried out.
        num_failed_ops: ops that were not: given up, refused, or too late.
        num_blocks: blocks that have arrived.
        num_failed_blocks: blocks of carried out ops that have not.
        num_bad_blocks: those of them whose stored copy was damaged.
        num_bytes: bytes of `num_blocks`.
        seconds: time spent carrying ops out, over all threads.
        num_queued: ops that wait now.
    """

    num_ops: int = 0
    num_failed_ops: int = 0
    num_blocks: int = 0
    num_failed_blocks: int = 0
    num_bad_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    num_queued: int = 0


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


def problem_of(op: TransferOp, hash_bytes: int | None, sides: Iterable[tuple[str, BlockIds, int]]) -> str:
    """Return why an op with content cannot be run; empty if it can.

    Args:
        op: the op.
        hash_bytes: bytes of each hash, None for any.
        sides: what its ids are called, the ids, and how many there are of their kind.
    """
    if op.content is None:
        return f"a {op.type.value} op says what its blocks hold"
    if hash_bytes is not None and op.content.hashes.shape[1] != hash_bytes:
        return f"block hashes have {hash_bytes} bytes here, not {op.content.hashes.shape[1]}"
    for name, ids, limit in sides:
        if len(ids) != len(op.content):
            return f"{len(op.content)} blocks come with the ids of {len(ids)} {name}s"
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            return f"{name}s {int(ids.min())}..{int(ids.max())} are not within 0..{limit - 1}"
    return ""
