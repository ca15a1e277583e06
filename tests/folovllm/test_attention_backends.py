"""Every attention backend computes what the formula says, on one contract."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.backends.flash_attn import FlashAttnBackend, padded_num_blocks
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.backends.triton_unified import TritonUnifiedBackend
from folovllm.attention.ops import block_rows, gather_kv, write_kv
from folovllm.attention.selector import BACKENDS, select_backend
from folovllm.errors import ConfigError

BLOCK, HEAD, KV_HEADS, NUM_BLOCKS = 4, 8, 2, 120


def make_step(
    lens: list[tuple[int, int]],
    heads: int,
    dtype: torch.dtype = torch.float32,
    stale: float = 0.0,
    num_blocks: int = NUM_BLOCKS,
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A cache filled with requests of (query_len, seq_len) in scattered blocks, `stale` in every other slot."""
    generator = torch.Generator().manual_seed(len(lens))
    cache = torch.full((num_blocks, 2, KV_HEADS, BLOCK, HEAD), stale, dtype=dtype)
    cache[0] = 0
    order = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).tolist())
    columns = max(-(-seq // BLOCK) for _, seq in lens) + 1
    tables = np.zeros((len(lens), columns), dtype=np.int32)
    slots, kvs = [], []
    for row, (query_len, seq_len) in enumerate(lens):
        for column in range(min(columns, -(-seq_len // BLOCK) + 1)):  # one block more than it needs
            tables[row, column] = next(order)
        positions = torch.arange(seq_len)
        blocks = torch.from_numpy(tables[row])[positions // BLOCK].long()
        key, value = (torch.randn(seq_len, KV_HEADS, HEAD, generator=generator).to(dtype) for _ in range(2))
        write_kv(cache, key, value, blocks, positions % BLOCK)
        slots.append((blocks * BLOCK + positions % BLOCK)[seq_len - query_len :])
        kvs.append((key, value))
    start = np.cumsum([0, *(query_len for query_len, _ in lens)]).astype(np.int32)
    seq_lens = np.array([seq_len for _, seq_len in lens], dtype=np.int32)
    slot_mapping = torch.cat(slots)
    metadata = AttentionMetadata(
        query_start_loc=torch.from_numpy(start),
        seq_lens=torch.from_numpy(seq_lens),
        block_tables=torch.from_numpy(tables),
        slot_mapping=slot_mapping,
        slot_blocks=slot_mapping // BLOCK,
        slot_offsets=slot_mapping % BLOCK,
        query_start_loc_cpu=start,
        seq_lens_cpu=seq_lens,
    )
    query = torch.randn(int(start[-1]), heads, HEAD, generator=generator).to(dtype)
    return query, cache, metadata, kvs


def attend(
    backend: Callable[[int, int, int, int], AttentionBackend],
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
) -> torch.Tensor:
    instance = backend(query.shape[1], KV_HEADS, HEAD, BLOCK)
    planned = dataclasses.replace(metadata, backend_plan=instance.plan(metadata))
    return instance.forward(query, cache, planned)


def by_formula(
    query: torch.Tensor, metadata: AttentionMetadata, kvs: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Token by token and head by head, in float64."""
    output = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // KV_HEADS
    starts = metadata.query_start_loc_cpu.tolist()
    for i, (key, value) in enumerate(kvs):
        query_len = starts[i + 1] - starts[i]
        for r in range(query_len):
            visible = len(key) - query_len + r + 1
            for h in range(query.shape[1]):
                k, v = (t[:visible, h // group].double() for t in (key, value))
                weights = torch.softmax(k @ query[starts[i] + r, h].double() / HEAD**0.5, dim=0)
                output[starts[i] + r, h] = weights @ v
    return output


CPU_BACKENDS = [backend for backend in BACKENDS if backend.supports(torch.device("cpu"), torch.float32, HEAD)]

BATCHES = {
    "one token": [(1, 1)],
    "whole prompts": [(5, 5), (4, 4), (3, 3), (1, 1), (9, 9)],
    "decodes": [(1, 2), (1, 4), (1, 5), (1, 17), (1, 40), (1, 64), (1, 65)],
    "chunks": [(2, 3), (3, 8), (7, 30), (4, 12)],
    "mixed": [(1, 9), (6, 6), (1, 33), (5, 20), (1, 1), (2, 13), (1, 8)],
}


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("group", [1, 3, 8])
def test_backend_equals_the_formula(backend, batch, group):
    query, cache, metadata, kvs = make_step(batch, group * KV_HEADS)
    torch.testing.assert_close(
        attend(backend, query, cache, metadata).double(), by_formula(query, metadata, kvs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda b: b.name)
def test_backend_stays_within_the_dtypes_precision(backend, dtype):
    query, cache, metadata, kvs = make_step(BATCHES["mixed"], 4, dtype)
    output = attend(backend, query, cache, metadata)
    assert output.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), by_formula(query, metadata, kvs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("batch", ["decodes", "mixed"])
def test_stale_nan_in_reused_blocks_never_reaches_the_output(backend, batch):
    clean = attend(backend, *make_step(BATCHES[batch], 4)[:3])
    dirty = attend(backend, *make_step(BATCHES[batch], 4, stale=float("nan"))[:3])
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", CPU_BACKENDS, ids=lambda b: b.name)
def test_rows_of_the_query_may_lie_apart(backend):
    query, cache, metadata, _ = make_step(BATCHES["mixed"], 4)
    fused = torch.full((len(query), 7, HEAD), float("nan"))
    fused[:, 1:5] = query
    assert torch.equal(attend(backend, fused[:, 1:5], cache, metadata), attend(backend, query, cache, metadata))


def rows_of(metadata: AttentionMetadata, i: int, first: int, end: int) -> AttentionMetadata:
    """A step of request i alone, in which its query rows [first, end) are computed."""
    starts = metadata.query_start_loc_cpu
    query_len = int(starts[i + 1] - starts[i])
    seq_lens = metadata.seq_lens_cpu[i : i + 1] - (query_len - end)
    start = np.array([0, end - first], dtype=np.int32)
    return dataclasses.replace(
        metadata,
        block_tables=metadata.block_tables[i : i + 1],
        query_start_loc=torch.from_numpy(start),
        query_start_loc_cpu=start,
        seq_lens=torch.from_numpy(seq_lens),
        seq_lens_cpu=seq_lens,
    )


@pytest.mark.parametrize("backend", [FlashAttnBackend, PagedBackend], ids=lambda b: b.name)
def test_a_decode_does_not_depend_on_its_neighbours(backend):
    query, cache, metadata, _ = make_step(BATCHES["decodes"], 4)
    together = attend(backend, query, cache, metadata)
    for i in range(len(query)):
        alone = attend(backend, query[i : i + 1], cache, rows_of(metadata, i, 0, 1))
        assert torch.equal(alone[0], together[i])


def batch_invariant(num_heads: int, num_kv_heads: int, head_size: int, block_size: int) -> PagedBackend:
    return PagedBackend(num_heads, num_kv_heads, head_size, block_size, batch_invariant=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4, 9])
def test_batch_invariant_rows_have_the_same_bits_in_any_chunk(group, dtype):
    query, cache, metadata, _ = make_step([(40, 40), (25, 90), (1, 30)], group * KV_HEADS, dtype)
    together = attend(batch_invariant, query, cache, metadata)
    starts = metadata.query_start_loc_cpu.tolist()
    for i in range(len(starts) - 1):
        for chunk in (1, 2, 3, 16, 33):
            rows = query[starts[i] : starts[i + 1]]
            for first in range(0, len(rows), chunk):
                end = min(first + chunk, len(rows))
                part = attend(batch_invariant, rows[first:end], cache, rows_of(metadata, i, first, end))
                assert torch.equal(part, together[starts[i] + first : starts[i] + end])


@pytest.mark.parametrize("backend", [FlashAttnBackend, TorchNaiveBackend], ids=lambda b: b.name)
def test_batch_invariance_is_refused_where_it_cannot_be_had(backend):
    with pytest.raises(ConfigError, match=rf"{backend.name}.*batch_invariant.*paged"):
        backend(4, 2, 64, 16, batch_invariant=True)


requests = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 60)).map(lambda lens: (lens[0], sum(lens))), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(requests=requests, group=st.integers(1, 9))
def test_paged_equals_naive_on_any_batch(requests, group):
    query, cache, metadata, _ = make_step(requests, group * KV_HEADS)
    expected = attend(TorchNaiveBackend, query, cache, metadata)
    torch.testing.assert_close(attend(PagedBackend, query, cache, metadata), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_equals_naive_where_long_contexts_are_split(dtype):
    # One request beside short ones: its keys are shared out among the threads.
    query, cache, metadata, _ = make_step([(1, 2500), (1, 5), (3, 1030)], 4, dtype, num_blocks=1000)
    expected = attend(TorchNaiveBackend, query.float(), cache.float(), metadata)
    tolerance = 4 * torch.finfo(dtype).eps
    output = attend(PagedBackend, query, cache, metadata)
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


def test_padding_wastes_at_most_a_third_and_yields_few_lengths():
    lengths = np.arange(1, 2049, dtype=np.int32)
    padded = padded_num_blocks(lengths)
    assert (padded >= lengths).all()
    assert (padded[3:] * 2 < lengths[3:] * 3 + 1).all()
    assert len(np.unique(padded)) <= 20


def test_gather_returns_what_write_stored():
    _, cache, metadata, kvs = make_step([(9, 9)], 2)
    key, value = gather_kv(cache, block_rows(metadata.block_tables[:1, :3], KV_HEADS))
    assert torch.equal(key[0, :, :9].transpose(0, 1), kvs[0][0])
    assert torch.equal(value[0, :, :9].transpose(0, 1), kvs[0][1])


def test_one_block_of_one_layer_is_contiguous_with_k_before_v():
    cache = torch.zeros(3, 2, KV_HEADS, BLOCK, HEAD)
    write_kv(
        cache, torch.full((1, KV_HEADS, HEAD), 1.0), torch.full((1, KV_HEADS, HEAD), 2.0), *torch.tensor([[2], [3]])
    )
    assert cache[2].is_contiguous()
    assert (cache[2, 0, :, 3] == 1).all()
    assert (cache[2, 1, :, 3] == 2).all()
    assert cache.count_nonzero() == 2 * KV_HEADS * HEAD


def test_auto_chooses_and_names_force_a_backend():
    cpu = torch.device("cpu")
    assert select_backend("auto", cpu, torch.float32, 64) is PagedBackend
    assert select_backend("auto", cpu, torch.float32, 63) is FlashAttnBackend
    assert select_backend("flash_attn", cpu, torch.float32, 64) is FlashAttnBackend
    assert select_backend("torch_naive", cpu, torch.float32, 64) is TorchNaiveBackend
    with pytest.raises(ConfigError, match=r"attention_backend='flash'.*auto, paged, flash_attn, torch_naive"):
        select_backend("flash", cpu, torch.float32, 64)


def test_a_backend_whose_package_is_missing_is_passed_over_and_cannot_be_forced(monkeypatch, caplog):
    device = torch.device("cuda")
    monkeypatch.setattr(TritonUnifiedBackend, "supports", lambda *_: True)
    monkeypatch.setattr(TritonUnifiedBackend, "missing_package", lambda: None)
    assert select_backend("triton_unified", device, torch.float32, 64) is TritonUnifiedBackend
    assert select_backend("auto", device, torch.float32, 64) is TritonUnifiedBackend
    monkeypatch.setattr(TritonUnifiedBackend, "missing_package", lambda: "triton")
    assert select_backend("auto", device, torch.float32, 64) is FlashAttnBackend
    assert "triton is not installed" in caplog.text
    with pytest.raises(ConfigError, match="needs the package triton, which is not installed"):
        select_backend("triton_unified", device, torch.float32, 64)
