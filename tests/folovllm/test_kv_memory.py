"""Memory of the KV cache: zeros that the system gives when they are first used."""

import gc
import logging
from pathlib import Path

import pytest
import torch

from folovllm.worker import kv_memory

CPU = torch.device("cpu")
SHAPE = (64, 2, 4, 16, 128)


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_is_zero_contiguous_and_can_be_written(dtype):
    cache = kv_memory.zeros(SHAPE, dtype, CPU)
    assert (cache.shape, cache.dtype, cache.is_contiguous()) == (SHAPE, dtype, True)
    assert not cache.any()
    cache[3, 1, 2, 5] = 7
    assert cache.sum() == 7 * SHAPE[-1]


def test_cache_outlives_other_views_of_it():
    last = kv_memory.zeros(SHAPE, torch.float32, CPU)[-1]
    gc.collect()
    last += 1
    assert last.sum() == last.numel()


def test_cache_takes_no_memory_until_it_is_used():
    before = resident_kib()
    cache = kv_memory.zeros((1 << 14, *SHAPE[1:]), torch.float32, CPU)  # 1 GiB
    assert cache.nbytes >> 10 == 1 << 20
    assert resident_kib() - before < 100_000


def test_empty_cache_is_possible():
    assert kv_memory.zeros((0, 4), torch.float32, CPU).shape == (0, 4)


def test_scarce_memory_is_announced_with_the_options_that_help(monkeypatch, caplog):
    monkeypatch.setattr(kv_memory, "_available_bytes", lambda: 2 << 30)
    with caplog.at_level(logging.WARNING):
        kv_memory.warn_if_scarce(2 << 30)
        assert caplog.messages == []
        kv_memory.warn_if_scarce(3 << 30)
    (message,) = caplog.messages
    assert "3.0 GiB" in message
    assert "kv_cache_memory_gb or num_kv_blocks" in message
