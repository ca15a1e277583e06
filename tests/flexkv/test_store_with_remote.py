"""KVManager instances that share a remote store: what one has computed, another loads."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.flexkv.device_memory import BLOCK, MODEL, make_kv_caches
from tests.flexkv.test_store_with_ssd import NUM_DEVICE_BLOCKS, Store, tokens_of

from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig, RemoteTierConfig, SsdTierConfig
from flexkv.common.request import KVResponse, ResponseStatus
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient


class SharingStore(Store):
    """Four blocks of memory of its own, and a remote store."""

    def __init__(self, stack: ExitStack, remote: RemoteTierConfig, ssd: SsdTierConfig | None = None) -> None:
        cpu, eviction = CpuTierConfig(num_blocks=4), EvictionConfig(evict_ratio=0.0)
        self.manager = stack.enter_context(KVManager(MODEL, CacheConfig(cpu, BLOCK, eviction, ssd=ssd, remote=remote)))
        self.kv_caches = make_kv_caches(MODEL, NUM_DEVICE_BLOCKS, BLOCK)
        client = stack.enter_context(KVTPClient(self.manager.device_dir, 0, MODEL, BLOCK))
        client.register(self.kv_caches)
        assert self.manager.wait_ready()

    def prefetch(self, kind: int, num_blocks: int) -> KVResponse:
        task = self.manager.prefetch_async(tokens_of(kind, num_blocks))
        return self.manager.wait([task])[task]


@contextmanager
def open_stores(count: int, url: str, **options) -> Iterator[list[SharingStore]]:
    with ExitStack() as stack:
        yield [SharingStore(stack, RemoteTierConfig(url, **options)) for _ in range(count)]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}"


def test_what_one_store_has_put_another_loads(url):
    with open_stores(2, url) as (writer, reader):
        assert writer.put(1, 4) == 4
        assert reader.get(1, 4) == 0, "a match does not wait for the remote store"
        assert reader.prefetch(1, 4).num_blocks == 4
        assert reader.get(1, 4) == 4
        reader.manager.check_integrity()


def test_a_prefetch_brings_the_part_that_is_there(url):
    with open_stores(2, url) as (writer, reader):
        writer.put(1, 2)
        assert reader.prefetch(1, 4).num_blocks == 2
        assert reader.get(1, 4) == 2
        assert reader.put(1, 4) == 2


def test_a_prefetch_of_what_nobody_has_ends_without_an_answer(url):
    with open_stores(1, url) as (store,):
        assert store.prefetch(1, 4).status is ResponseStatus.NOT_FOUND


def test_a_prefetch_takes_from_the_disk_first(tmp_path, url):
    directory = tmp_path / "ssd"
    with ExitStack() as stack:
        ssd = SsdTierConfig((directory,), num_blocks=8)
        store = SharingStore(stack, RemoteTierConfig(url), ssd)
        store.put(1, 3)
        store.put(2, 4)
        assert store.prefetch(1, 3).num_blocks == 3
        assert store.get(1, 3) == 3


def test_a_store_that_only_reads_puts_nothing(url):
    with open_stores(2, url, write="none") as (writer, reader):
        writer.put(1, 4)
        assert reader.prefetch(1, 4).status is ResponseStatus.NOT_FOUND


def test_other_namespaces_share_nothing(url):
    with ExitStack() as stack:
        one, other = (SharingStore(stack, RemoteTierConfig(url, namespace=name)) for name in ("one", "other"))
        one.put(1, 4)
        assert other.prefetch(1, 4).status is ResponseStatus.NOT_FOUND


def test_a_dead_remote_store_is_a_miss_and_stops_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        pytest.importorskip("redis")
        with open_stores(1, url, get_deadline_s=0.3, put_deadline_s=0.3) as (store,):
            assert store.put(1, 4) == 4, "it is in memory"
            assert store.prefetch(2, 4).status is ResponseStatus.NOT_FOUND
            assert store.get(1, 4) == 4


def test_a_cancelled_prefetch_ends_at_once(url):
    with open_stores(2, url) as (writer, reader):
        writer.put(1, 4)
        task = reader.manager.prefetch_async(tokens_of(1, 4))
        reader.manager.cancel([task])
        assert reader.manager.wait([task])[task].status in (ResponseStatus.CANCELLED, ResponseStatus.SUCCESS)
        assert reader.manager.drain()
        reader.manager.check_integrity()
