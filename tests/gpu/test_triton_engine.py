"""A whole model on the Triton kernels, decodes padded as for CUDA graphs: the tokens of torch's kernels.

On a GPU, or without one in Triton's interpreter, where the replay does the captured work again.
"""

import os
from collections.abc import Callable

import pytest
import torch
from tests.folovllm.runner_driver import RunnerDriver, make_runner

from folovllm.attention.backends.triton_unified import TritonUnifiedBackend
from folovllm.model_executor import loader
from folovllm.worker import model_runner
from folovllm.worker.cuda_graphs import Captured, CUDAGraphRecorder, DecodeBuffers, GraphedForward

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or Triton's interpreter"
    ),
]
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
PROMPTS = [[(31 * i * n) % 2000 for i in range(1, n + 1)] for n in (3, 12)]
OPTIONS = {"device": DEVICE, "kernels": "torch", "block_size": 8, "num_kv_blocks": 64, "max_model_len": 64}


class RedoingRecorder:
    """Replays by doing the work again."""

    def capture(self, work: Callable[[], torch.Tensor]) -> Captured:
        result = work().clone()

        def replay() -> None:
            result.copy_(work())

        return Captured(replay, result)


def test_model_on_triton_kernels_gives_the_tokens_of_torch(small_model, monkeypatch):
    from folovllm.ops.triton_ops import TritonOps

    expected = RunnerDriver(make_runner(small_model, attention_backend="torch_naive", **OPTIONS)).generate(PROMPTS, 3)
    monkeypatch.setattr(loader, "TorchOps", TritonOps)
    monkeypatch.setattr(model_runner, "select_backend", lambda *_: TritonUnifiedBackend)
    monkeypatch.setattr(TritonUnifiedBackend, "num_sms", 16)
    runner = make_runner(small_model, **OPTIONS)
    assert RunnerDriver(runner).generate(PROMPTS, 3, chunk=7) == expected

    recorder = RedoingRecorder() if IS_INTERPRETED else CUDAGraphRecorder()
    buffers = DecodeBuffers(4, 64, 8, runner.device)
    graphed = GraphedForward(runner.model, runner.backend, buffers, [2, 4], recorder)
    graphed.capture(runner.kv_caches)
    runner.compute = graphed
    assert RunnerDriver(runner).generate(PROMPTS, 3) == expected
