"""One worker in the engine core's own process. Mirrors vllm/v1/executor/uniproc_executor.py."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.executor.abstract import Executor
from folovllm.worker.cpu_worker import CPUWorker
from folovllm.worker.gpu_worker import GPUWorker
from folovllm.worker.worker_base import WorkerBase

T = TypeVar("T")


class UniProcExecutor(Executor):
    """Calls the worker in the caller's thread, or with asynchronous scheduling in a thread of its own.

    All calls are then made there, the first and the last too: the current CUDA device and the pool of OpenMP threads
    belong to a thread.
    """

    def __init__(self, config: EngineConfig) -> None:
        worker_class: type[WorkerBase] = GPUWorker if config.device.type == "cuda" else CPUWorker
        is_async = config.scheduler_config.async_scheduling
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker") if is_async else None
        try:
            self.worker = self._call(lambda: worker_class(config)).result()
        except BaseException:
            if self._thread is not None:
                self._thread.shutdown()
            raise

    def execute_model(self, scheduler_output: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Run one step, or hand it to the worker's thread."""
        return self._call(lambda: self.worker.execute_model(scheduler_output))

    def shutdown(self) -> None:
        """Let the steps that were given end, then release the worker; idempotent."""
        self._call(self.worker.shutdown).result()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _call(self, function: Callable[[], T]) -> Future[T]:
        if self._thread is not None:
            return self._thread.submit(function)
        done: Future[T] = Future()
        done.set_result(function())
        return done
