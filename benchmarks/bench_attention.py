"""Paged attention on a CPU: decodes against the read bandwidth, prefills against torch's SDPA, in the same run.

    python benchmarks/bench_attention.py [--short] [--threads 2] [--repeat 9]

One layer of Qwen3-0.6B's shape (16 query heads, 8 KV heads of 128), blocks of 16 tokens scattered over the pool. Every
call finds the cache of another layer, cold, as in a model. `read` sums the same caches with torch. SDPA gets K and V
already gathered, in the layout it likes best. Runs take turns, so that a busy machine slows all; the median of each
counts.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from bench_environment import environment
from folovllm import _native
from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.backends.flash_attn import FlashAttnBackend
from folovllm.attention.backends.paged import PagedBackend

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 16, 8, 128, 16
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_SIZE * 2
# Of all layers' caches: more than what stays in a processor's own caches.
COLD_BYTES = 2**30
MOST_USERS = 4
# Threads of the run before still spin for a while, on this one's cores; then a run that is not timed wakes its own.
SETTLE_S = 0.03


class Batch:
    """Requests of (query_len, seq_len) with random K and V."""

    def __init__(self, lens: list[tuple[int, int]], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        columns = max(-(-seq_len // BLOCK_SIZE) for _, seq_len in lens)
        num_blocks = len(lens) * columns + 1
        shape = (num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
        kv_cache = torch.empty(shape, dtype=dtype).normal_(generator=generator)
        num_layers = -(-COLD_BYTES // kv_cache.nbytes)
        self.kv_caches = [kv_cache, *(kv_cache.clone() for _ in range(num_layers - 1))]
        tables = torch.randperm(num_blocks - 1, generator=generator).view(len(lens), columns) + 1
        starts = np.cumsum([0, *(query_len for query_len, _ in lens)]).astype(np.int32)
        seq_lens = np.array([seq_len for _, seq_len in lens], dtype=np.int32)
        unused = torch.zeros(int(starts[-1]), dtype=torch.int64)
        self.metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.from_numpy(seq_lens),
            block_tables=tables.int(),
            slot_mapping=unused,
            slot_blocks=unused,
            slot_offsets=unused,
            query_start_loc_cpu=starts,
            seq_lens_cpu=seq_lens,
        )
        self.query = torch.empty(int(starts[-1]), NUM_HEADS, HEAD_SIZE, dtype=dtype).normal_(generator=generator)
        self._num_users = 0

    def run(self, backend: AttentionBackend) -> Callable[[], object]:
        metadata = dataclasses.replace(self.metadata, backend_plan=backend.plan(self.metadata))
        layers = self._layers()
        return lambda: backend.forward(self.query, next(layers), metadata)

    def read(self) -> Callable[[], object]:
        layers = self._layers()
        return lambda: next(layers).view(-1).view(torch.int64).sum()

    def _layers(self) -> Iterator[torch.Tensor]:
        """All layers in turn. Who takes turns with others begins elsewhere, or the one before would warm its cache."""
        first = self._num_users * len(self.kv_caches) // MOST_USERS
        self._num_users += 1
        return itertools.cycle(self.kv_caches[first:] + self.kv_caches[:first])


def make_backend(kind: type[AttentionBackend], **options: bool) -> AttentionBackend:
    return kind(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, **options)


def median_ms(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeat):
        for name, function in functions.items():
            time.sleep(SETTLE_S)
            function()
            begin = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(ms: dict[str, float]) -> dict[str, float]:
    """Times, and how many times as long as `paged` each peer takes."""
    times = {f"{name}_ms": round(value, 3) for name, value in ms.items()}
    return times | {f"{name}_ratio": round(value / ms["paged"], 2) for name, value in ms.items() if name != "paged"}


def measure_decode(context: int, batch_size: int, repeat: int) -> dict[str, object]:
    batch = Batch([(1, context)] * batch_size, torch.bfloat16)
    functions = {
        "paged": batch.run(make_backend(PagedBackend)),
        "batch_invariant": batch.run(make_backend(PagedBackend, batch_invariant=True)),
        "flash_attn": batch.run(make_backend(FlashAttnBackend)),
        "read": batch.read(),
    }
    ms = median_ms(functions, repeat)
    gb_s = context * batch_size * TOKEN_BYTES / ms["paged"] / 1e6
    read_gb_s = batch.kv_caches[0].nbytes / ms["read"] / 1e6
    return {
        "context": context,
        "batch": batch_size,
        "gb_s": round(gb_s, 1),
        "fraction_of_read_bandwidth": round(gb_s / read_gb_s, 2),
        **compare(ms),
    }


def measure_prefill(num_tokens: int, dtype: torch.dtype, repeat: int) -> dict[str, object]:
    batch = Batch([(num_tokens, num_tokens)], dtype)
    group = NUM_HEADS // NUM_KV_HEADS
    query = batch.query.transpose(0, 1)[None].contiguous()
    key, value = (torch.randn(1, NUM_KV_HEADS, num_tokens, HEAD_SIZE).to(dtype) for _ in range(2))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    functions = {
        "paged": batch.run(make_backend(PagedBackend)),
        "batch_invariant": batch.run(make_backend(PagedBackend, batch_invariant=True)),
        "flash_attn": batch.run(make_backend(FlashAttnBackend)),
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
    }
    ms = median_ms(functions, repeat)
    operations = 2 * NUM_HEADS * num_tokens * num_tokens * HEAD_SIZE
    return {
        "tokens": num_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "gflop_s": round(operations / ms["paged"] / 1e6, 1),
        **compare(ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer shapes and runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    repeat = 3 if args.short else args.repeat
    torch.set_num_threads(args.threads)
    _native.set_num_threads(args.threads)
    contexts, batch_sizes = ([512, 2048], [1, 8]) if args.short else ([512, 2048, 8192], [1, 8, 32])
    lengths = [512] if args.short else [512, 2048]
    document = {
        "benchmark": "attention",
        "environment": environment(),
        "threads": args.threads,
        "instructions": _native.current_isa(),
        "decode": [measure_decode(context, size, repeat) for context in contexts for size in batch_sizes],
        "prefill": [
            measure_prefill(length, dtype, repeat) for length in lengths for dtype in (torch.bfloat16, torch.float32)
        ],
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
