"""The contract between the engine core and its workers. Mirrors vllm/v1/executor/abstract.py."""

from abc import ABC, abstractmethod
from concurrent.futures import Future

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput


class Executor(ABC):
    """Runs steps on all ranks, in the order in which they are given. Used by the engine core's thread."""

    config: EngineConfig | None = None
    """With what only a loaded model could tell, such as the number of KV blocks; None: nothing was left open."""

    @abstractmethod
    def execute_model(self, scheduler_output: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Run one step; also without tokens, for the sake of the KV connector.

        With asynchronous scheduling it returns at once, and a second step may be given before the first is done; else
        the caller waits for each. What fails in a worker is raised here or by the future.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Let the steps that were given end, release everything; idempotent."""
