"""The contract between the engine core and its workers. Mirrors vllm/v1/executor/abstract.py."""

from abc import ABC, abstractmethod

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput


class Executor(ABC):
    """Runs steps on all ranks. Used by the engine core's thread."""

    @classmethod
    def create(cls, config: EngineConfig) -> "Executor":
        """Build the executor the configuration asks for; the model is loaded when this returns.

        Raises:
            ModelLoadError: the checkpoint is unusable.
            ConfigError: an option is not possible on this device, or the KV connector cannot be loaded.
        """
        from folovllm.executor.uniproc_executor import UniProcExecutor

        return UniProcExecutor(config)

    @abstractmethod
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step; also without tokens, for the sake of the KV connector."""

    @abstractmethod
    def shutdown(self) -> None:
        """Release everything; idempotent."""
