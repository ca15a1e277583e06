"""Memory of the KV cache. The counterpart of `initialize_kv_cache_tensors` of vLLM's gpu_model_runner.py.

On a CPU the system gives zero pages when a block is first used: touching gigabytes at the start would take seconds.
Blocks are handed out in the order of their ids at first, so a pool that is never full never takes all its memory.
"""

import logging
import mmap
from math import prod

import torch

logger = logging.getLogger(__name__)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor of zeros that lives until nobody holds it."""
    num_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a wish: fewer page faults, and fewer misses of the TLB in attention
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def warn_if_scarce(num_bytes: int) -> None:
    """Say so when the machine has less memory to give than a cache on its CPU may come to take."""
    available = _available_bytes()
    if available is not None and num_bytes > available:
        logger.warning(
            "the KV cache may grow to %.1f GiB, but %.1f GiB of memory are available; "
            "lower kv_cache_memory_gb or num_kv_blocks",
            num_bytes / 2**30,
            available / 2**30,
        )


def _available_bytes() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        logger.debug("no /proc/meminfo")
    return None
