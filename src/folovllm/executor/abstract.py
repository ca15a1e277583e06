"""The contract between the engine core and its workers. Mirrors vllm/v1/executor/abstract.py."""

from abc import ABC, abstractmethod

from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput


class Executor(ABC):
    """Runs steps on all ranks. Used by the engine core's thread."""

    @abstractmethod
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step; also without tokens, for the sake of the KV connector."""

    @abstractmethod
    def shutdown(self) -> None:
        """Release everything; idempotent."""
