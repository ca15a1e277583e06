"""Which worker a device asks for."""

from folovllm.config import EngineConfig
from folovllm.model_executor.parallel import TensorParallel
from folovllm.worker.cpu_worker import CPUWorker
from folovllm.worker.gpu_worker import GPUWorker
from folovllm.worker.worker_base import WorkerBase


def create_worker(config: EngineConfig, parallel: TensorParallel) -> WorkerBase:
    """Build one rank's worker; its share of the model is loaded when this returns.

    Raises:
        ModelLoadError: the checkpoint is unusable.
        ConfigError: an option is not possible on this device, or the KV connector cannot be loaded.
    """
    worker_class: type[WorkerBase] = GPUWorker if config.device.type == "cuda" else CPUWorker
    return worker_class(config, parallel)
