"""Steps over a paged cache of any shape, and what attention over them is by its formula; on any device."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata


@dataclass(frozen=True)
class Heads:
    """The shape of a cache."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int


@dataclass(frozen=True)
class Step:
    """A batch: its queries, the cache they attend over, and the keys and values of each request."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    metadata: AttentionMetadata
    keys: list[torch.Tensor]
    """By request, `[seq_len, num_kv_heads, head_size]`."""
    values: list[torch.Tensor]


def make_step(
    lens: list[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    stale: float = float("nan"),
) -> Step:
    """Requests of (query_len, seq_len) in scattered blocks; `stale` in every slot that holds none of their tokens."""
    generator = torch.Generator().manual_seed(sum(seq for _, seq in lens))
    columns = max(-(-seq // heads.block_size) for _, seq in lens) + 1
    num_blocks = 1 + sum(-(-seq // heads.block_size) + 1 for _, seq in lens)
    shape = (num_blocks, 2, heads.num_kv_heads, heads.block_size, heads.head_size)
    cache = torch.full(shape, stale, dtype=dtype)
    order = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).tolist())
    tables = np.zeros((len(lens), columns), dtype=np.int32)
    slots, keys, values = [], [], []
    for row, (query_len, seq_len) in enumerate(lens):
        for column in range(-(-seq_len // heads.block_size)):
            tables[row, column] = next(order)
        positions = torch.arange(seq_len)
        blocks = torch.from_numpy(tables[row])[positions // heads.block_size].long()
        size = (seq_len, heads.num_kv_heads, heads.head_size)
        key, value = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
        cache[blocks, :, :, positions % heads.block_size] = torch.stack((key, value), dim=1)
        slots.append((blocks * heads.block_size + positions % heads.block_size)[seq_len - query_len :])
        keys.append(key)
        values.append(value)
    query = torch.randn(sum(q for q, _ in lens), heads.num_heads, heads.head_size, generator=generator).to(dtype)
    return Step(
        query.to(device), cache.to(device), make_metadata(lens, tables, torch.cat(slots), heads, device), keys, values
    )


def make_metadata(
    lens: list[tuple[int, int]], tables: np.ndarray, slots: torch.Tensor, heads: Heads, device: torch.device | str
) -> AttentionMetadata:
    """The step's description, its tensors on `device`."""
    start = np.cumsum([0, *(query_len for query_len, _ in lens)]).astype(np.int32)
    seq_lens = np.array([seq_len for _, seq_len in lens], dtype=np.int32)
    return AttentionMetadata(
        query_start_loc=torch.from_numpy(start).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        slot_mapping=slots.to(device),
        slot_blocks=(slots // heads.block_size).to(device),
        slot_offsets=(slots % heads.block_size).to(device),
        query_start_loc_cpu=start,
        seq_lens_cpu=seq_lens,
    )


def by_formula(step: Step) -> torch.Tensor:
    """Request by request in float64, on the host."""
    query = step.query.double().cpu()
    output = torch.empty_like(query)
    starts = step.metadata.query_start_loc_cpu.tolist()
    group = query.shape[1] // step.keys[0].shape[1]
    for i, (key, value) in enumerate(zip(step.keys, step.values, strict=True)):
        rows = query[starts[i] : starts[i + 1]]
        wide_key, wide_value = (t.double().repeat_interleave(group, dim=1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", rows, wide_key) / query.shape[2] ** 0.5
        visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(key) - len(rows))
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        output[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", weights, wide_value)
    return output


def attend(backend: AttentionBackend, step: Step) -> torch.Tensor:
    """Plan and run."""
    planned = replace(step.metadata, backend_plan=backend.plan(step.metadata))
    return backend.forward(step.query, step.kv_cache, planned)
