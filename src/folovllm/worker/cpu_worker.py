"""Worker on the CPU. Mirrors vllm/v1/worker/cpu_worker.py."""

import torch

from folovllm.config import EngineConfig
from folovllm.worker.worker_base import WorkerBase


class CPUWorker(WorkerBase):
    """Runs the model in this process's threads."""

    def prepare_device(self, config: EngineConfig) -> None:
        """Set the number of threads of torch's arithmetic, which is global to the process."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
