"""Device <-> CPU tier copies of flexkv against memcpy with as many threads, in the same run.

    python benchmarks/bench_flexkv_copy.py [--gib 1.0] [--threads 2] [--repeat 7]

The device is host memory, as on the CPU backend. Workload: every block of a pool, in random order, to other blocks.
The peer copies as many bytes in one piece per thread with ctypes.memmove, which is memcpy without the GIL. Runs take
turns, so that a busy machine slows both; the best of each counts.
"""

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from bench_environment import environment
from flexkv.common.config import ModelConfig
from flexkv.common.storage import PoolLayout, device_layout
from flexkv.storage.allocator import CpuPool
from flexkv.transfer.device_copier import HostCopier

# (name, layers, heads, head size, tokens per block, memory order): bytes contiguous on both sides per block and layer.
SHAPES = [
    ("64 KB runs", 28, 8, 128, 16, "bkhte"),  # Qwen3-0.6B in bf16, this project's engine
    ("4 KB runs", 28, 8, 128, 16, "bkht"),  # heads strided: keys and values of all blocks interleaved by head
    ("256 B runs", 28, 8, 128, 16, "bkth"),  # tokens strided
]


def best_seconds(functions: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeat):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def memcpy(target: int, source: int, size: int, num_threads: int) -> None:
    share = size // num_threads
    threads = [
        threading.Thread(target=ctypes.memmove, args=(target + i * share, source + i * share, share))
        for i in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kv_tensors(model: ModelConfig, num_blocks: int, tokens: int, order: str) -> dict[str, torch.Tensor]:
    sizes = {"b": num_blocks, "k": 2, "h": model.num_kv_heads, "t": tokens, "e": model.head_size}
    full = order + "e" if not order.endswith("e") else order
    # Padding every head (or token) breaks contiguity there, as views into larger buffers do.
    padded = order[-1] if order != full else None
    tensors = {}
    for layer in range(model.num_layers):
        shape = [sizes[dim] + (1 if dim == padded else 0) for dim in full]
        raw = torch.ones(shape, dtype=torch.bfloat16)
        if padded is not None:
            raw = raw.narrow(full.index(padded), 0, sizes[padded])
        tensors[str(layer)] = raw.permute([full.index(dim) for dim in "bkhte"])
    return tensors


def measure(shape: tuple, gib: float, num_threads: int, repeat: int) -> dict:
    name, layers, heads, head_size, tokens, order = shape
    model = ModelConfig(layers, heads, head_size, "bfloat16")
    num_blocks = int(gib * 2**30) // model.block_bytes(tokens)
    kv_caches = kv_tensors(model, num_blocks, tokens, order)
    layout = device_layout(kv_caches, model, tokens)
    pool = CpuPool.create(PoolLayout(num_blocks, layout.block_bytes))
    pool.blocks()[:] = 1
    copier = HostCopier(kv_caches, layout, pool, 0, num_threads)
    rng = np.random.default_rng(0)
    ids = {"device_blocks": rng.permutation(num_blocks), "pool_blocks": rng.permutation(num_blocks)}
    size = num_blocks * layout.block_bytes
    scratch = np.ones(size, np.uint8)
    runs = {
        "to_pool": lambda: copier.copy(to_device=False, first_layer=0, num_layers=layers, **ids),
        "to_device": lambda: copier.copy(to_device=True, first_layer=0, num_layers=layers, **ids),
        "memcpy": lambda: memcpy(scratch.ctypes.data, pool.address, size, num_threads),
    }
    seconds = best_seconds(runs, repeat)
    return {
        "shape": name,
        "block_bytes": layout.block_bytes,
        "num_blocks": num_blocks,
        **{f"{run}_gb_s": round(size / s / 1e9, 2) for run, s in seconds.items()},
        **{f"{run}_of_memcpy": round(seconds["memcpy"] / seconds[run], 3) for run in ("to_pool", "to_device")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="bytes copied per run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    results = [measure(shape, args.gib, args.threads, args.repeat) for shape in SHAPES]
    document = {
        "benchmark": "flexkv_copy",
        "environment": environment(),
        "threads": args.threads,
        "results": results,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
