"""One worker in the engine core's own process. Mirrors vllm/v1/executor/uniproc_executor.py."""

from concurrent.futures import Future

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.executor.abstract import Executor
from folovllm.executor.step_thread import StepThread
from folovllm.executor.worker_factory import create_worker
from folovllm.model_executor.parallel import TensorParallel


class UniProcExecutor(Executor):
    """Calls the worker directly, or with asynchronous scheduling through a thread."""

    def __init__(self, config: EngineConfig) -> None:
        self._thread = StepThread(config.scheduler_config.async_scheduling)
        try:
            self.worker = self._thread.call(lambda: create_worker(config, TensorParallel())).result()
        except BaseException:
            self._thread.close()
            raise
        self.config = self.worker.config

    def execute_model(self, scheduler_output: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Run one step, or hand it to the worker's thread."""
        return self._thread.call(lambda: self.worker.execute_model(scheduler_output))

    def shutdown(self) -> None:
        """Let the steps that were given end, then release the worker; idempotent."""
        self._thread.call(self.worker.shutdown).result()
        self._thread.close()
