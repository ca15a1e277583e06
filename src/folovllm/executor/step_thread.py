"""Where a worker's calls run: in the caller's thread, or with asynchronous scheduling in one of their own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

T = TypeVar("T")


class StepThread:
    """Runs calls one after the other, in the order in which they are given; a context manager.

    With a thread of its own, all calls are made there, the first and the last too: the current CUDA device and the pool
    of OpenMP threads belong to a thread.
    """

    def __init__(self, is_async: bool) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker") if is_async else None

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function`, or hand it to the thread; what it raises in the caller's thread is raised here."""
        if self._thread is not None:
            return self._thread.submit(function)
        done: Future[T] = Future()
        done.set_result(function())
        return done

    def close(self) -> None:
        """Let the calls that were given end; later ones run in the caller's thread. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
