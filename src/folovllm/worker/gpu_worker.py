"""Worker on one CUDA device. Mirrors vllm/v1/worker/gpu_worker.py."""

import torch

from folovllm.config import EngineConfig
from folovllm.worker.worker_base import WorkerBase


class GPUWorker(WorkerBase):
    """Runs the model on `config.device`."""

    def prepare_device(self, config: EngineConfig) -> None:
        """Make the device current for this thread."""
        torch.cuda.set_device(config.device)
