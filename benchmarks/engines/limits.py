"""What the machine can do, measured in the same run as what is compared with it."""

import statistics
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
"""More than any cache a core has for itself. A cache that a machine shares may hold it: then weights fit there too."""


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median duration of `work`, after a first run."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_gb_per_s(threads: int) -> float:
    """Bytes per second of a sum over a large buffer."""
    torch.set_num_threads(threads)
    buffer = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / seconds(buffer.sum) / 1e9


def gemm_gflop_per_s(threads: int, rows: int = 2048, inputs: int = 1024, outputs: int = 6144) -> float:
    """bf16 multiply-adds of torch's matrix product (oneDNN) at a prompt's shape, two operations each."""
    torch.set_num_threads(threads)
    x = torch.randn(rows, inputs).bfloat16()
    weight = torch.randn(outputs, inputs).bfloat16()
    taken = seconds(lambda: torch.nn.functional.linear(x, weight))
    return 2 * rows * inputs * outputs / taken / 1e9
