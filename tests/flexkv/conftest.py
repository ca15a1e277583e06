"""Stores with a device worker each, that must leave nothing behind."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.flexkv.device_memory import BLOCK, MODEL, Stack, make_kv_caches

from flexkv.common.config import CacheConfig, CpuTierConfig, TransferConfig
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient


@pytest.fixture
def make_stack() -> Iterator[Callable[..., Stack]]:
    """Build stores with one in-process device worker each; they are shut down, and must leave no thread."""
    before = set(threading.enumerate())
    with ExitStack() as stack:

        def make(num_cpu_blocks: int = 8, num_device_blocks: int = 16, *, gated: bool = False, **transfer) -> Stack:
            kv_caches = make_kv_caches(MODEL, num_device_blocks, BLOCK)
            cache = CacheConfig(CpuTierConfig(num_blocks=num_cpu_blocks), BLOCK, transfer=TransferConfig(**transfer))
            store = stack.enter_context(KVManager(MODEL, cache))
            client = stack.enter_context(KVTPClient(store.device_dir, 0, MODEL, BLOCK, gated=gated))
            client.register(kv_caches)
            assert store.wait_ready(10.0)
            return Stack(store, client, kv_caches)

        yield make
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left, f"threads left: {left}"
