"""Worker on one CUDA device. Mirrors vllm/v1/worker/gpu_worker.py."""

import torch

from folovllm.config import EngineConfig
from folovllm.core.kv_connector import KVConnector
from folovllm.model_executor.parallel import TensorParallel
from folovllm.worker.cuda_graphs import CUDAGraphRecorder, DecodeBuffers, GraphedForward, capture_sizes
from folovllm.worker.kv_cache_sizing import run_largest_step
from folovllm.worker.worker_base import WorkerBase


class GPUWorker(WorkerBase):
    """Runs the model on `config.device`; decodes as CUDA graphs where the attention backend lets itself be captured."""

    def __init__(self, config: EngineConfig, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        runner = self.model_runner
        # Compiles kernels, and finds out now rather than later whether the largest step has room.
        run_largest_step(runner.config, runner.model, runner.backend)
        if not config.enforce_eager and runner.backend.supports_cuda_graphs:
            self._capture_decodes(runner.config)

    def prepare_device(self, config: EngineConfig) -> None:
        """Make the device current for this thread."""
        torch.cuda.set_device(config.device)

    def _capture_decodes(self, config: EngineConfig) -> None:
        runner = self.model_runner
        sizes = capture_sizes(config.scheduler_config.max_num_seqs)
        buffers = DecodeBuffers(sizes[-1], runner.config.model_config.max_model_len, runner.block_size, runner.device)
        graphed = GraphedForward(runner.compute, runner.backend, buffers, sizes, CUDAGraphRecorder())
        graphed.replays_with_layer_hooks = not works_by_layer(runner.connector)
        graphed.capture(runner.kv_caches)
        runner.compute = graphed


def works_by_layer(connector: KVConnector | None) -> bool:
    """Whether `wait_for_layer_load` and `save_kv_layer` do anything.

    vLLM's connectors say so by `requires_piecewise_for_cudagraph(extra_config)`; one without that method has its hooks
    called.
    """
    if connector is None:
        return False
    says = getattr(connector, "requires_piecewise_for_cudagraph", None)
    return says is None or bool(says({}))
