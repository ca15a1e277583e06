"""Worker on the CPU. Mirrors vllm/v1/worker/cpu_worker.py."""

import os

import torch

from folovllm import _native
from folovllm.config import EngineConfig
from folovllm.errors import ConfigError
from folovllm.worker.worker_base import WorkerBase


class CPUWorker(WorkerBase):
    """Runs the model in this process's threads."""

    def prepare_device(self, config: EngineConfig) -> None:
        """Set the number of threads of the kernels and of torch's arithmetic, which are global to the process."""
        cpus = sorted(os.sched_getaffinity(0))
        num_ranks = config.parallel_config.tensor_parallel_size
        num_threads = config.num_threads if config.num_threads is not None else max(1, len(cpus) // num_ranks)
        torch.set_num_threads(num_threads)
        if config.cpu_threads_bind == "all" and num_threads > len(cpus):
            raise ConfigError(
                f"cpu_threads_bind='all' has {len(cpus)} CPUs for num_threads={num_threads}; ask for no more threads"
            )
        _native.set_num_threads(num_threads, cpus if config.cpu_threads_bind == "all" else [])
