"""Which steps are replayed, and how they are padded: without CUDA, by a recorder that does the work again."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.folovllm.runner_driver import RunnerDriver, make_runner

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.ops import write_kv
from folovllm.engine.arg_utils import EngineArgs
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.recorded_forward import RecordedForward
from folovllm.ops import torch_ops
from folovllm.worker.cuda_graphs import Captured, DecodeBuffers, GraphedForward, capture_sizes, padded_size
from folovllm.worker.gpu_worker import works_by_layer

NAME = "qwen3-wide-heads-gqa2"
MAX_LEN, BLOCK = 64, 4


class CapturableBackend(TorchNaiveBackend):
    """The reference, which reads lengths on the device, as a captured kernel does."""

    supports_cuda_graphs = True

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        lengths = metadata.seq_lens.numpy()
        num_reqs = int(np.count_nonzero(lengths))  # padding comes last
        num_tokens = int(metadata.query_start_loc_cpu[num_reqs])
        output = torch.zeros_like(query)
        real = replace(metadata, seq_lens_cpu=lengths[:num_reqs].copy())
        output[:num_tokens] = super().forward(query[:num_tokens], kv_cache, real)
        return output


class RedoingRecorder:
    """Replays by doing the work again, with whatever the buffers hold then."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def capture(self, work: Callable[[], torch.Tensor]) -> Captured:
        result = work().clone()
        self.captured.append(len(result))

        def replay() -> None:
            self.replayed.append(len(result))
            result.copy_(work())

        return Captured(replay, result)


@pytest.fixture
def skips_padding(monkeypatch):
    """As the kernel on CUDA does."""

    def write(kv_cache, key, value, slot_blocks, slot_offsets):
        real = slot_blocks >= 0
        write_kv(kv_cache, key[real], value[real], slot_blocks[real], slot_offsets[real])

    monkeypatch.setattr(torch_ops, "write_kv", write)


@given(st.integers(1, 2000))
def test_sizes_rise_end_with_the_largest_batch_and_waste_little(max_num_seqs):
    sizes = capture_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, 512)
    for num_reqs in range(1, sizes[-1] + 1):
        size = padded_size(num_reqs, sizes)
        assert size is not None
        assert num_reqs <= size < num_reqs + 16
    assert padded_size(sizes[-1] + 1, sizes) is None


def make_driver(checkpoint, **options) -> tuple[RunnerDriver, RedoingRecorder]:
    """A runner whose decodes of up to 6 requests are replayed."""
    runner = make_runner(checkpoint(NAME), kernels="torch", block_size=BLOCK, max_model_len=MAX_LEN, **options)
    backend = CapturableBackend(
        *(getattr(runner.backend, n) for n in ("num_heads", "num_kv_heads", "head_size")), BLOCK
    )
    runner.backend = backend
    for layer in runner.model.attention_layers():
        layer.backend = backend
    recorder = RedoingRecorder()
    graphed = GraphedForward(
        runner.model, backend, DecodeBuffers(6, MAX_LEN, BLOCK, torch.device("cpu")), [1, 2, 4, 6], recorder
    )
    graphed.capture(runner.kv_caches)
    runner.compute = graphed
    return RunnerDriver(runner), recorder


PROMPTS = [[(7 * i * n) % 250 for i in range(1, n + 1)] for n in (3, 9, 14, 4, 8, 17, 5)]


@pytest.mark.usefixtures("skips_padding")
def test_replayed_decodes_give_the_same_tokens(checkpoint, reference):
    driver, recorder = make_driver(checkpoint)
    assert recorder.captured == [6, 4, 2, 1]
    for count in (5, 7, 3, 1):
        recorder.replayed.clear()
        outputs = driver.generate(PROMPTS[:count], 8)
        assert outputs == [reference(NAME, prompt, 8) for prompt in PROMPTS[:count]]
        size = {5: 6, 7: None, 3: 4, 1: 1}[count]
        assert recorder.replayed == ([] if size is None else [size] * 7)


@pytest.mark.usefixtures("skips_padding")
def test_steps_with_prefills_are_not_replayed(checkpoint):
    driver, recorder = make_driver(checkpoint)
    driver.add("long", PROMPTS[5])
    driver.step({"long": 5})
    assert recorder.replayed == []
    driver.add("short", PROMPTS[0])
    driver.step({"long": 1, "short": 2})
    assert recorder.replayed == []
    driver.step({"long": 1, "short": 1})
    assert recorder.replayed == [2]


@pytest.mark.usefixtures("skips_padding")
def test_padding_writes_to_no_block(checkpoint):
    driver, recorder = make_driver(checkpoint)
    for i, prompt in enumerate(PROMPTS[:3]):
        driver.add(f"r{i}", prompt)
    driver.step_all()
    before = {name: cache.clone() for name, cache in driver.runner.kv_caches.items()}
    driver.step_all()
    assert recorder.replayed == [4]
    for name, cache in driver.runner.kv_caches.items():
        changed = (cache != before[name]).any(dim=-1).any(dim=2).any(dim=1)  # [block, slot]
        assert int(changed.sum()) == 3


@pytest.mark.usefixtures("skips_padding")
def test_rows_of_an_earlier_larger_batch_are_cleared():
    buffers = DecodeBuffers(4, MAX_LEN, BLOCK, torch.device("cpu"))
    backend = CapturableBackend(2, 2, 8, BLOCK)
    for count in (4, 2):
        lengths = torch.full((count,), 9, dtype=torch.int32)
        slots = torch.arange(20, 20 + count)
        step = AttentionMetadata(
            query_start_loc=torch.arange(count + 1, dtype=torch.int32),
            seq_lens=lengths,
            block_tables=torch.ones((count, 3), dtype=torch.int32),
            slot_mapping=slots,
            slot_blocks=slots // BLOCK,
            slot_offsets=slots % BLOCK,
            query_start_loc_cpu=np.arange(count + 1, dtype=np.int32),
            seq_lens_cpu=lengths.numpy(),
        )
        buffers.fill(torch.zeros(count, dtype=torch.int32), torch.full((count,), 8), step, 4)
        view = buffers.metadata(4, backend)
        assert view.seq_lens.tolist() == [9] * count + [0] * (4 - count)
        assert view.slot_mapping.tolist() == [*range(20, 20 + count), *[-1] * (4 - count)]
        assert view.slot_blocks.tolist() == [5] * count + [-1] * (4 - count)
        assert view.seq_lens_cpu.tolist() == [MAX_LEN] * 4


class LayerHooks:
    """Hooks that do nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata) -> None:
        pass


@pytest.mark.usefixtures("skips_padding")
@pytest.mark.parametrize("may_skip", [True, False])
def test_layer_hooks_prevent_a_replay_unless_they_may_be_skipped(checkpoint, may_skip):
    driver, recorder = make_driver(checkpoint)
    graphed = driver.runner.compute
    graphed.replays_with_layer_hooks = may_skip
    buffers = DecodeBuffers(1, MAX_LEN, BLOCK, torch.device("cpu"))
    metadata = buffers.metadata(1, driver.runner.backend)
    context = ForwardContext(metadata, driver.runner.kv_caches, LayerHooks())
    with torch.inference_mode():
        graphed(buffers.input_ids, buffers.positions, context)
    assert recorder.replayed == ([1] if may_skip else [])


class SaysConnector:
    """vLLM's way to say whether a connector works layer by layer."""

    answer: ClassVar[bool]

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config) -> bool:
        return cls.answer


def test_a_connector_works_by_layer_unless_it_says_no():
    assert not works_by_layer(None)
    assert works_by_layer(object())
    for answer in (True, False):
        connector = type("Connector", (SaysConnector,), {"answer": answer})()
        assert works_by_layer(connector) == answer


def test_enforce_eager_reaches_the_configuration_and_is_heeded(checkpoint):
    for value in (False, True):
        args = EngineArgs(model=str(checkpoint(NAME)), device="cpu", num_kv_blocks=8, enforce_eager=value)
        assert args.resolve().enforce_eager is value
    eager, recorded = (make_runner(checkpoint(NAME), enforce_eager=value) for value in (True, False))
    assert eager.compute is eager.model
    assert isinstance(recorded.compute, RecordedForward)
