"""The threads that tokenise: a fixed number of them, a bounded queue, a deadline for every caller.

```
callers ── submit ──> queue (queue_size) ──> kvrouter-tokenize-0..n-1 ── future ──> callers
```
A full queue refuses at once; a caller past its deadline goes on without an answer, and what has not begun by then is
not begun any more. `close` ends the threads after the job each of them has in hand.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Self, TypeVar

from kvrouter.errors import DeadlineExceededError, PoolClosedError, PoolOverloadError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Job = tuple["Future[Any]", Callable[[], Any]]


class TokenizationPool:
    """Runs jobs on a few threads; every method may be called from any thread."""

    def __init__(self, workers_count: int = 5, queue_size: int = 1024, timeout_s: float = 2.0) -> None:
        """Start the workers.

        Args:
            workers_count: threads.
            queue_size: jobs that may wait; at least as many as there are workers.
            timeout_s: how long `run` and `run_async` wait for a job, its time in the queue included.
        """
        self._timeout_s = timeout_s
        self._jobs: queue.Queue[_Job | None] = queue.Queue(max(queue_size, workers_count))
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvrouter-tokenize-{index}", daemon=True)
            for index in range(workers_count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, job: Callable[[], T]) -> T:
        """Run `job` on a worker and return its result.

        Raises:
            PoolOverloadError: the queue is full.
            PoolClosedError: the pool is closed.
            DeadlineExceededError: no result within the pool's timeout.
            Exception: whatever `job` raises.
        """
        future = self._submit(job)
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            if future.done() and not future.cancelled():
                raise  # the job's own
            future.cancel()
            raise self._late() from error
        except CancelledError as error:
            raise PoolClosedError("the tokenization pool was closed meanwhile") from error

    async def run_async(self, job: Callable[[], T]) -> T:
        """Like `run`, without blocking the event loop."""
        future = self._submit(job)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise self._late() from error

    def close(self) -> None:
        """End the workers; jobs that have not begun are cancelled. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while True:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is not None:
                    job[0].cancel()
        for _ in self._threads:
            self._jobs.put_nowait(None)  # there is room: the queue is empty, takes nothing more, and fits them all
        for thread in self._threads:
            thread.join(self._timeout_s)
            if thread.is_alive():
                logger.error("tokenization thread did not end name=%s", thread.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:  # so that nothing is queued behind the workers' end
            if self._closed:
                raise PoolClosedError("the tokenization pool is closed")
            try:
                self._jobs.put_nowait((future, job))
            except queue.Full:
                raise PoolOverloadError(f"{self._jobs.maxsize} prompts are waiting to be tokenised already") from None
        return future

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"no token ids within {self._timeout_s:g} s")

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:  # waits for a job, or for `close`
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = job()
            except BaseException as error:  # thread boundary: the error is the caller's to see
                future.set_exception(error)
            else:
                future.set_result(result)
