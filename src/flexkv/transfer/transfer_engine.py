"""One thread that owns every running op graph: hands ready ops to workers, and results to the task engine.

submit/cancel (any thread) --inbox--> transfer thread --submit--> workers
                                            ^------- report -------'
"""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flexkv.common.transfer import TransferOp, TransferOpGraph, TransferType
from flexkv.errors import TransferError
from flexkv.transfer.scheduler import TransferScheduler
from flexkv.transfer.worker import OpResult, ScheduledOp, TransferWorker

logger = logging.getLogger(__name__)


class TransferListener(Protocol):
    """Who is told how ops and graphs end; called by the transfer thread."""

    def on_op_finished(self, task_id: int, result: OpResult) -> None:
        """An op ended; one that never ran is not ok."""
        ...

    def on_graph_finished(self, task_id: int) -> None:
        """Every op of the task's graph has ended, and was reported."""
        ...


@dataclass(frozen=True, slots=True)
class _Launch:
    graph: TransferOpGraph
    task_id: int


@dataclass(frozen=True, slots=True)
class _Cancel:
    graph_id: int


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Message = _Launch | _Cancel | _Stop | OpResult


class TransferEngine:
    """Runs graphs. `submit` and `cancel` are thread-safe and never block.

    The inbox holds at most a launch, a cancel and the results of each task alive, so the task engine's limit on tasks
    bounds it. Every op has a deadline: one that has not begun by then is cancelled at its worker and fails.
    """

    def __init__(
        self, workers: Mapping[TransferType, TransferWorker], listener: TransferListener, op_timeout_s: float
    ) -> None:
        """Wire the engine.

        Args:
            workers: who runs which type of op.
            listener: told about every end.
            op_timeout_s: deadline of an op, from when it is handed to its worker, in seconds.
        """
        self._workers = dict(workers)
        self._listener = listener
        self._op_timeout_s = op_timeout_s
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flexkv-transfer", daemon=True)
        self._started = False
        self._lock = threading.Lock()
        self._ended = False  # protected by _lock: the thread takes no more messages
        # Owned by the transfer thread:
        self._scheduler = TransferScheduler()
        self._launched: dict[int, _Launch] = {}  # by graph id, until the graph is done
        self._running: dict[int, TransferOp] = {}
        self._deadlines: list[tuple[float, int]] = []

    def start(self) -> None:
        """Start the workers and the thread."""
        for worker in set(self._workers.values()):
            worker.start(self._inbox.put)
        self._started = True
        self._thread.start()

    def submit(self, graph: TransferOpGraph, task_id: int) -> None:
        """Run a bound graph; the engine owns it from now on.

        Raises:
            TransferError: the engine has stopped.
        """
        with self._lock:
            if self._ended:
                raise TransferError("the transfer engine has stopped")
            self._inbox.put(_Launch(graph, task_id))

    @property
    def is_alive(self) -> bool:
        """Whether graphs are being run."""
        with self._lock:
            return self._started and not self._ended

    def cancel(self, graph_id: int) -> None:
        """Run no further op of a graph; those that have begun run to their end. The graph still finishes."""
        self._inbox.put(_Cancel(graph_id))

    def close(self, timeout_s: float = 10.0) -> None:
        """Close the workers, fail what they had not finished, and end the thread. Idempotent.

        Raises:
            TransferError: the thread did not end in time.
        """
        for worker in set(self._workers.values()):
            worker.close()
        if self._started:
            self._inbox.put(_Stop())
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TransferError(f"the transfer thread did not end within {timeout_s} s")

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception:  # the thread's boundary: nothing may be waited for in vain
            logger.exception("the transfer thread failed; every task it had fails")
        with self._lock:
            self._ended = True
        for message in self._drain():
            if isinstance(message, _Launch):
                self._launched[message.graph.graph_id] = message
        for launch in self._launched.values():
            self._listener.on_graph_finished(launch.task_id)

    def _step(self) -> bool:
        """Wait for messages or the next deadline, then advance every graph; False when asked to stop."""
        messages = self._receive()
        finished: list[OpResult] = []
        for message in messages:
            match message:
                case OpResult():
                    if message.op_id in self._running:
                        finished.append(message)
                case _Launch():
                    self._launched[message.graph.graph_id] = message
                    self._scheduler.add(message.graph)
                case _Cancel():
                    self._cancel_graph(message.graph_id)
                case _Stop():
                    return False
        self._advance(finished)
        self._cancel_overdue()
        return True

    def _receive(self) -> list[_Message]:
        # Without an op there is nothing to be late for: the next message ends the wait, `close` sends one.
        timeout = max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None
        try:
            first = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return []
        return [first, *self._drain()]

    def _drain(self) -> list[_Message]:
        messages: list[_Message] = []
        try:
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def _advance(self, finished: list[OpResult]) -> None:
        # Ops first: their results must be known before the graph counts as finished.
        for result in finished:
            op = self._running.pop(result.op_id)
            self._listener.on_op_finished(self._launched[op.graph_id].task_id, result)
        done, next_ops = self._scheduler.schedule(finished)
        for op in self._scheduler.take_abandoned():
            task_id = self._launched[op.graph_id].task_id
            if worker := self._workers.get(op.type):
                worker.abandon(task_id)
            self._listener.on_op_finished(task_id, OpResult(op.op_id, False, "not run"))
        for graph_id in done:
            self._listener.on_graph_finished(self._launched.pop(graph_id).task_id)
        for op in next_ops:
            self._dispatch(op)

    def _dispatch(self, op: TransferOp) -> None:
        self._running[op.op_id] = op
        worker = self._workers.get(op.type)
        if worker is None:
            self._inbox.put(OpResult(op.op_id, False, f"no worker for {op.type.value}"))
            return
        heapq.heappush(self._deadlines, (time.monotonic() + self._op_timeout_s, op.op_id))
        launch = self._launched[op.graph_id]
        num_task_ops = sum(self._workers.get(other.type) is worker for other in launch.graph.ops.values())
        worker.submit(ScheduledOp(op, launch.task_id, num_task_ops, self._op_timeout_s))

    def _cancel_graph(self, graph_id: int) -> None:
        self._scheduler.give_up(graph_id)
        for op in self._running.values():
            if op.graph_id == graph_id and (worker := self._workers.get(op.type)):
                worker.cancel(op.op_id)

    def _cancel_overdue(self) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, op_id = heapq.heappop(self._deadlines)
            if op := self._running.get(op_id):
                logger.warning("op overdue op_id=%d type=%s: cancelled", op_id, op.type.value)
                self._workers[op.type].cancel(op_id)
