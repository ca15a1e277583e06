"""Attention backends on a CUDA device at the shapes of real models, and captured in a graph."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.folovllm.paged_steps import Heads, Step, attend, by_formula, make_step

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.selector import BACKENDS, select_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
MODELS = {
    "Qwen3-0.6B": Heads(16, 8, 128, 16),
    "Qwen2.5-0.5B": Heads(14, 2, 64, 16),
    "Llama-3-8B": Heads(32, 8, 128, 16),
    "Gemma-like heads": Heads(8, 4, 256, 16),
    "blocks of 32": Heads(16, 8, 128, 32),
}
BATCHES = {
    "prompt of 2048": [(2048, 2048)],
    "chunk behind a long context": [(512, 6000)],
    "one long decode": [(1, 8192)],
    "decodes": [(1, 17 * (i + 1)) for i in range(64)],
    "mixed": [(1, 5000), (300, 300), (64, 1500), *((1, 100 + i) for i in range(20)), (7, 4000)],
}


def made(backend: type[AttentionBackend], heads: Heads) -> AttentionBackend:
    return backend(heads.num_heads, heads.num_kv_heads, heads.head_size, heads.block_size)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS.keys())
def test_chosen_backend_equals_the_reference(heads, batch, dtype):
    step = make_step(batch, heads, dtype, "cuda", stale=0.0)
    chosen = select_backend("auto", torch.device("cuda", 0), dtype, heads.head_size)
    wide = replace(step, query=step.query.float(), kv_cache=step.kv_cache.float())
    torch.testing.assert_close(
        attend(made(chosen, heads), step).float(),
        attend(made(TorchNaiveBackend, heads), wide),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "paged"], ids=lambda b: b.name)
def test_no_backend_reads_stale_slots(backend):
    heads = MODELS["Qwen3-0.6B"]
    if backend.missing_package() is not None or not backend.supports(torch.device("cuda", 0), torch.float32, 128):
        pytest.skip("cannot run here")
    step = make_step(BATCHES["mixed"], heads, device="cuda")
    step.kv_cache[0] = 0  # the null block, which nothing is written to, may be multiplied by zero
    torch.testing.assert_close(
        attend(made(backend, heads), step).double().cpu(), by_formula(step), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("num_reqs", [1, 5, 64])
def test_a_captured_launch_serves_other_lengths(num_reqs):
    heads = MODELS["Qwen3-0.6B"]
    chosen = select_backend("auto", torch.device("cuda", 0), torch.bfloat16, heads.head_size)
    if not chosen.supports_cuda_graphs:
        pytest.skip("Triton is not installed")
    backend = made(chosen, heads)
    steps = [
        make_step([(1, 1 + (i + 1) * factor % 1500) for i in range(num_reqs)], heads, torch.bfloat16, "cuda", stale=0.0)
        for factor in (3999, 17, 251)
    ]
    static = widest(steps)
    planned = replace(static.metadata, seq_lens_cpu=np.full(num_reqs, 4096, dtype=np.int32))
    planned = replace(planned, backend_plan=backend.plan(planned))
    backend.forward(static.query, static.kv_cache, planned)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = backend.forward(static.query, static.kv_cache, planned)
    for step in steps:
        static.query.copy_(step.query)
        static.kv_cache[: len(step.kv_cache)].copy_(step.kv_cache)
        static.metadata.seq_lens.copy_(step.metadata.seq_lens)
        tables = step.metadata.block_tables
        static.metadata.block_tables[:, : tables.shape[1]].copy_(tables)
        graph.replay()
        torch.testing.assert_close(output.double().cpu(), by_formula(step), rtol=1.6e-2, atol=1.6e-2)


def widest(steps: list[Step]) -> Step:
    """Buffers with room for each of the steps."""
    caches, tables = (
        max((step.kv_cache for step in steps), key=len),
        max((step.metadata.block_tables for step in steps), key=lambda table: table.shape[1]),
    )
    first = steps[0]
    metadata = replace(
        first.metadata, block_tables=torch.zeros_like(tables), seq_lens=torch.zeros_like(first.metadata.seq_lens)
    )
    return replace(first, query=torch.zeros_like(first.query), kv_cache=torch.zeros_like(caches), metadata=metadata)
