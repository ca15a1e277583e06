"""One direction of a worker: ops wait in a queue, threads carry them out in batches.

    submit --> queue --batch--> thread --carry_out--> results --report-->
                  `- cancelled, too late, or closed: reported as failed, never begun

Ops begin in the order in which they came. In a lane of one thread, what `call` was given runs before every op that is
submitted after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final

from flexkv.errors import TransferError
from flexkv.transfer.worker import OpResult, PathStats, ReportResult, ScheduledOp

logger = logging.getLogger(__name__)

_MOST_QUEUED: Final = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class QueuedOp:
    """An op and the time.monotonic() by which it must have begun."""

    scheduled: ScheduledOp
    deadline: float

    @property
    def op_id(self) -> int:
        """The op's id."""
        return self.scheduled.op.op_id

    @property
    def num_blocks(self) -> int:
        """Blocks of the op."""
        return self.scheduled.op.num_blocks


CarryOut = Callable[[Sequence[QueuedOp]], Sequence[OpResult]]
"""Runs a batch to its end on a lane's thread; returns one result per op, in order. What it raises fails the batch."""


@dataclass(frozen=True, slots=True)
class LaneConfig:
    """How a lane works.

    Attributes:
        name: of its threads, and in logs.
        num_threads: batches carried out at once.
        max_batch_ops: most ops of a batch.
        max_batch_blocks: most blocks of a batch; an op with more is one by itself.
        block_bytes: bytes of a block, for the statistics.
        deadline_s: an op that has not begun so long after it was submitted fails; None for the op's own timeout.
        close_timeout_s: how long a running batch may still take when the lane is closed.
    """

    name: str
    num_threads: int
    max_batch_ops: int
    max_batch_blocks: int
    block_bytes: int
    deadline_s: float | None
    close_timeout_s: float


class Lane:
    """Thread-safe. `submit`, `cancel` and `call` never block; every op submitted is reported exactly once."""

    def __init__(self, config: LaneConfig, carry_out: CarryOut) -> None:
        """Make a lane that carries ops out with `carry_out`, once started."""
        self._config = config
        self._carry_out = carry_out
        self._report: ReportResult = _not_started
        self._threads = [
            threading.Thread(target=self._run, name=f"{config.name}-{i}", daemon=True)
            for i in range(config.num_threads)
        ]
        self._changed = threading.Condition()
        # Protected by _changed:
        self._queue: deque[QueuedOp] = deque()
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._running: dict[int, QueuedOp] = {}
        self._stats = PathStats()
        self._is_started = False
        self._is_closed = False

    def start(self, report: ReportResult) -> None:
        """Start the threads; results go to `report`."""
        self._report = report
        self._is_started = True
        for thread in self._threads:
            thread.start()

    def submit(self, scheduled: ScheduledOp) -> None:
        """Queue an op."""
        timeout_s = scheduled.timeout_s if self._config.deadline_s is None else self._config.deadline_s
        queued = QueuedOp(scheduled, time.monotonic() + timeout_s)
        with self._changed:
            reason = f"{self._config.name} is closed" if self._is_closed else ""
            if not reason and len(self._queue) >= _MOST_QUEUED:
                reason = f"{_MOST_QUEUED} ops wait for {self._config.name}"
            if not reason:
                self._queue.append(queued)
                self._changed.notify()
        if reason:
            self.refuse(queued.op_id, reason)

    def refuse(self, op_id: int, reason: str) -> None:
        """Report an op that is not queued as failed."""
        with self._changed:
            self._stats.num_failed_ops += 1
        self._report(OpResult(op_id, False, reason))

    def cancel(self, op_id: int) -> None:
        """Report an op as failed if it waits still."""
        with self._changed:
            found = next((queued for queued in self._queue if queued.op_id == op_id), None)
            if found is not None:
                self._queue.remove(found)
        if found is not None:
            self.refuse(op_id, "cancelled")

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Run a function on a thread of the lane, between batches; its end, or TransferError, is in the future."""
        future: Future[None] = Future()
        with self._changed:
            if not self._is_closed:
                self._calls.append((function, future))
                self._changed.notify()
                return future
        future.set_exception(TransferError(f"{self._config.name} is closed"))
        return future

    def stats(self) -> PathStats:
        """Return a copy of the counters."""
        with self._changed:
            return replace(self._stats, num_queued=len(self._queue))

    def close(self) -> bool:
        """Fail what waits, let running batches end, and end the threads. Idempotent.

        Returns whether all threads have ended. If not, their ops are reported as failed with all blocks retired.
        """
        with self._changed:
            left, self._queue = list(self._queue), deque()
            calls, self._calls = list(self._calls), deque()
            self._is_closed = True
            self._changed.notify_all()
        for _, future in calls:
            future.set_exception(TransferError(f"{self._config.name} was closed"))
        for queued in left:
            self.refuse(queued.op_id, "the store closes")
        if not self._is_started:
            return True
        end = time.monotonic() + self._config.close_timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            return True
        logger.error("%s did not end within %g s: its blocks are lost", self._config.name, self._config.close_timeout_s)
        with self._changed:
            stuck, self._running = list(self._running.values()), {}
        for queued in stuck:
            blocks = tuple(range(queued.num_blocks))
            self._report(OpResult(queued.op_id, False, "it never ended", failed=blocks, retired=blocks))
        return False

    # -- the lane's threads ----------------------------------------------------------------------------------------
    def _run(self) -> None:
        while self._wait():
            self._run_calls()
            if batch := self._take():
                self._run_batch(batch)

    def _wait(self) -> bool:
        """Wait for something to do; False once closed."""
        with self._changed:
            while not (self._is_closed or self._queue or self._calls):
                self._changed.wait()  # for work, or for `close`, which the transfer engine calls in any case
            return not self._is_closed

    def _run_calls(self) -> None:
        with self._changed:
            calls, self._calls = list(self._calls), deque()
        for function, future in calls:
            try:
                function()
            except Exception as error:  # the thread's boundary: it is the caller's to hear
                logger.warning("%s: a call failed error=%s", self._config.name, error)
                future.set_exception(error)
            else:
                future.set_result(None)

    def _take(self) -> list[QueuedOp]:
        """Take the next batch; ops that are late already are reported."""
        batch: list[QueuedOp] = []
        late: list[QueuedOp] = []
        num_blocks = 0
        with self._changed:
            now = time.monotonic()
            while self._queue and len(batch) < self._config.max_batch_ops:
                queued = self._queue[0]
                if queued.deadline <= now:
                    late.append(self._queue.popleft())
                    continue
                num_blocks += queued.num_blocks
                if batch and num_blocks > self._config.max_batch_blocks:
                    break
                batch.append(self._queue.popleft())
            self._running.update((queued.op_id, queued) for queued in batch)
        for queued in late:
            self.refuse(queued.op_id, "it could not begin before its deadline")
        return batch

    def _run_batch(self, batch: Sequence[QueuedOp]) -> None:
        begin = time.perf_counter()
        try:
            results = self._carry_out(batch)
        except Exception as error:  # the thread's boundary: these ops failed, later ones may not
            logger.exception("%s: a batch failed num_ops=%d", self._config.name, len(batch))
            text = f"{type(error).__name__}: {error}"
            results = [OpResult(queued.op_id, False, text) for queued in batch]
        seconds = time.perf_counter() - begin
        with self._changed:
            self._stats.seconds += seconds
            for queued, result in zip(batch, results, strict=True):
                self._count(queued, result)
            mine = [result for result in results if self._running.pop(result.op_id, None) is not None]
        for result in mine:
            self._report(result)

    def _count(self, queued: QueuedOp, result: OpResult) -> None:
        if not result.ok:
            self._stats.num_failed_ops += 1
            return
        num_arrived = queued.num_blocks - len(result.failed)
        self._stats.num_ops += 1
        self._stats.num_blocks += num_arrived
        self._stats.num_failed_blocks += len(result.failed)
        self._stats.num_bad_blocks += len(result.bad)
        self._stats.num_bytes += num_arrived * self._config.block_bytes


def _not_started(result: OpResult) -> None:
    raise AssertionError(f"op {result.op_id} came before start")
