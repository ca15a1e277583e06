"""One worker in the engine core's own process. Mirrors vllm/v1/executor/uniproc_executor.py."""

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.executor.abstract import Executor
from folovllm.worker.cpu_worker import CPUWorker
from folovllm.worker.gpu_worker import GPUWorker
from folovllm.worker.worker_base import WorkerBase


class UniProcExecutor(Executor):
    """Calls the worker directly."""

    def __init__(self, config: EngineConfig) -> None:
        worker_class: type[WorkerBase] = GPUWorker if config.device.type == "cuda" else CPUWorker
        self.worker = worker_class(config)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step in the calling thread."""
        return self.worker.execute_model(scheduler_output)

    def shutdown(self) -> None:
        """Release the worker; idempotent."""
        self.worker.shutdown()
