"""What a card can do, measured in the same run as what is compared with it."""

import statistics
from collections.abc import Callable

import torch

COPY_BYTES = 2 << 30
"""Many times a card's L2 cache."""
GEMM_SIZE = 8192


def gpu_seconds(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median duration on the card of one call, each between two events; the host is far ahead."""
    for _ in range(warmup):
        work()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and bytes written by a copy within the card's memory, together."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / gpu_seconds(lambda: target.copy_(source)) / 1e9


def gemm_tflop_per_s(device: torch.device) -> float:
    """bf16 multiply-adds of cuBLAS on random matrices, two operations each."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).bfloat16() for _ in range(2))
    return 2 * GEMM_SIZE**3 / gpu_seconds(lambda: a @ b) / 1e12
