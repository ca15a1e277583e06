"""One device's share of the engine. Mirrors vllm/v1/worker/worker_base.py."""

from abc import ABC, abstractmethod

from folovllm.config import EngineConfig
from folovllm.core.kv_connector import KVConnectorRole, create_connector
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.model_executor.parallel import TensorParallel
from folovllm.worker.model_runner import ModelRunner


class WorkerBase(ABC):
    """Prepares its device, then holds the model runner and the worker half of the KV connector."""

    def __init__(self, config: EngineConfig, parallel: TensorParallel) -> None:
        self.prepare_device(config)
        self.model_runner = ModelRunner(config, parallel)
        config = self.config = self.model_runner.config
        if config.kv_transfer_config is not None:
            connector = create_connector(config, KVConnectorRole.WORKER)
            connector.register_kv_caches(self.model_runner.kv_caches)
            self.model_runner.connector = connector

    @abstractmethod
    def prepare_device(self, config: EngineConfig) -> None:
        """Set what is global to the process or thread, before anything is allocated."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        return self.model_runner.execute_model(scheduler_output)

    def shutdown(self) -> None:
        """Release the connector; idempotent."""
        connector, self.model_runner.connector = self.model_runner.connector, None
        if connector is not None:
            connector.shutdown()
