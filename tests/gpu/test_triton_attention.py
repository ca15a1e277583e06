"""The Triton kernels of attention against its formula: on a GPU, or without one in Triton's interpreter.

tests/folovllm/test_triton_interpreter.py runs this file in a process of its own with TRITON_INTERPRET=1, which must be
set before Triton is imported.
"""

import os
from dataclasses import replace

import pytest
import torch
from tests.folovllm.paged_steps import Heads, attend, by_formula, make_step

from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.backends.triton_unified import TritonUnifiedBackend

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or Triton's interpreter"
    ),
]
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

BATCHES = {
    "one token": [(1, 1)],
    "whole prompts": [(5, 5), (16, 16), (1, 1), (70, 70)],
    "decodes": [(1, 2), (1, 8), (1, 9), (1, 63), (1, 64), (1, 65), (1, 300)],
    "chunks": [(2, 3), (3, 8), (17, 130), (64, 192)],
    "mixed": [(1, 9), (6, 6), (1, 133), (5, 20), (1, 1), (20, 100), (1, 64)],
}
SHAPES = {
    "gqa2": Heads(4, 2, 16, 16),
    "gqa3, odd head size": Heads(6, 2, 24, 8),
}


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Splits of a single tile, so that short requests are split too."""
    from folovllm.attention import triton_unified

    monkeypatch.setattr(triton_unified, "_MIN_TILES_PER_SPLIT", 1)


def backend(heads: Heads, num_sms: int) -> TritonUnifiedBackend:
    """With the splits of a card of so many multiprocessors."""
    made = TritonUnifiedBackend(heads.num_heads, heads.num_kv_heads, heads.head_size, heads.block_size)
    made.num_sms = num_sms
    return made


@pytest.mark.parametrize("num_sms", [1, 1000], ids=["one split", "many splits"])
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_kernel_equals_the_formula_and_reads_no_stale_slot(batch, heads, num_sms):
    step = make_step(batch, heads, device=DEVICE)
    output = attend(backend(heads, num_sms), step)
    torch.testing.assert_close(output.double().cpu(), by_formula(step), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_sms", [1, 1000], ids=["one split", "many splits"])
@pytest.mark.parametrize("batch", ["decodes", "mixed"])
def test_kernel_stays_within_the_dtypes_precision(batch, num_sms, dtype):
    heads = Heads(8, 1, 32, 16)
    step = make_step(BATCHES[batch], heads, dtype, DEVICE)
    output = attend(backend(heads, num_sms), step)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double().cpu(), by_formula(step), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_kernel_equals_the_reference_backend():
    heads = Heads(8, 2, 32, 16)
    step = make_step(BATCHES["mixed"], heads, device=DEVICE, stale=0.0)
    naive = TorchNaiveBackend(heads.num_heads, heads.num_kv_heads, heads.head_size, heads.block_size)
    torch.testing.assert_close(attend(backend(heads, 1), step), attend(naive, step), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_sms", [1, 1000], ids=["one split", "many splits"])
def test_rows_of_a_padded_batch_read_no_block_and_give_zeros(num_sms):
    heads = Heads(4, 2, 16, 16)
    step = make_step([(1, 300), (1, 40), (1, 1), (1, 1)], heads, device=DEVICE)
    expected = by_formula(step)
    seq_lens = torch.tensor([300, 40, 0, 0], dtype=torch.int32, device=DEVICE)
    nowhere = step.metadata.block_tables.clone()
    nowhere[2:] = 2**30  # reading there would be seen
    output = attend(backend(heads, num_sms), replace(step, metadata=replace(
        step.metadata, seq_lens=seq_lens, block_tables=nowhere
    )))  # fmt: skip
    torch.testing.assert_close(output[:2].double().cpu(), expected[:2], rtol=2e-5, atol=2e-5)
    assert not output[2:].any()


def test_queries_and_caches_of_any_strides():
    heads = Heads(4, 2, 16, 8)
    step = make_step(BATCHES["mixed"], heads, device=DEVICE)
    fused = torch.zeros(len(step.query), 9, 16, device=DEVICE)
    fused[:, 2:6] = step.query
    layers = torch.full((step.kv_cache.shape[0], 3, *step.kv_cache.shape[1:]), float("nan"), device=DEVICE)
    layers[:, 1] = step.kv_cache
    apart = replace(step, query=fused[:, 2:6], kv_cache=layers[:, 1])
    torch.testing.assert_close(attend(backend(heads, 1), apart).double().cpu(), by_formula(step), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_stores_each_token_in_its_slot_and_skips_padding(dtype):
    from folovllm.attention.triton_write import write_kv

    qkv = torch.randn(5, 4 + 3 + 3, 24, device=DEVICE).to(dtype)
    key, value = qkv[:, 4:7], qkv[:, 7:]
    cache = torch.zeros(6, 2, 3, 8, 24, dtype=dtype, device=DEVICE)
    expected = cache.clone()
    blocks, offsets = torch.tensor([3, 3, -1, 5, 1]), torch.tensor([0, 7, 7, 2, 4])
    for token in (0, 1, 3, 4):
        expected[blocks[token], 0, :, offsets[token]] = key[token]
        expected[blocks[token], 1, :, offsets[token]] = value[token]
    write_kv(cache, key, value, blocks.to(DEVICE), offsets.to(DEVICE))
    assert torch.equal(cache, expected)


def test_few_long_requests_are_split_and_many_are_not():
    heads = Heads(4, 2, 16, 16)
    few, many = make_step([(1, 300)], heads), make_step([(1, 300)] * 40, heads)
    assert backend(heads, 1000).plan(few.metadata)[4].num_splits == 4  # of 5 tiles
    assert backend(heads, 1).plan(few.metadata)[4].num_splits == 1
    assert backend(heads, 40).plan(many.metadata)[4].num_splits == 1
