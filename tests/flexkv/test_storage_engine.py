"""The storage of all tiers opens as a whole or not at all, and knows what its blocks mean."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.flexkv.device_memory import BLOCK, Stack, fill_block, make_kv_caches, read_block, slots_of
from tests.flexkv.device_memory import MODEL as DEVICE_MODEL
from tests.flexkv.tier_workers import BLOCK_BYTES, LAYOUT, MODEL, NUM_POOL_BLOCKS, content_of, ids, ssd_config

from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, RemoteTierConfig, SsdTierConfig
from flexkv.common.fingerprint import block_fingerprint, fingerprint_text
from flexkv.common.transfer import BlockContent, TransferOp, TransferOpGraph, TransferType
from flexkv.errors import ConfigError
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient
from flexkv.storage.ssd_rows import StoredBlocks
from flexkv.storage.storage_engine import StorageEngine
from kvblocks.hashing import BlockHasher

CPU_ONLY = CacheConfig(CpuTierConfig(num_blocks=NUM_POOL_BLOCKS))


def all_tiers(directory: Path) -> CacheConfig:
    return replace(ssd_config(directory / "ssd"), remote=RemoteTierConfig(f"file://{directory}/remote"))


def store_rows(storage: StorageEngine, *slots: int) -> None:
    """Say that slots are stored, as the writing thread does."""
    hashes = content_of(slots).hashes
    none = np.zeros(len(slots), np.int64)
    blocks = StoredBlocks(ids(slots), hashes, np.zeros_like(hashes), none.astype(np.uint64), none)
    storage.ssd.insert(blocks)


def test_only_what_is_configured_is_opened(tmp_path):
    with StorageEngine(MODEL, CPU_ONLY) as storage:
        assert (storage.ssd, storage.remote) == (None, None)
        assert storage.cpu_pool.layout.block_stride == BLOCK_BYTES, "no padding where nobody needs it"
        storage.bind_layout(LAYOUT)
    with StorageEngine(MODEL, all_tiers(tmp_path)) as storage:
        assert storage.ssd is not None
        assert storage.remote is not None
        assert storage.ssd.num_bytes == 10 * 8192
        assert storage.cpu_pool.layout.block_stride == 8192
        assert storage.cpu_pool.layout.block_bytes == BLOCK_BYTES


def test_closing_twice_is_closing_once_and_the_tiers_open_again(tmp_path):
    for _ in range(2):
        storage = StorageEngine(MODEL, all_tiers(tmp_path))
        storage.close()
        storage.close()


def test_the_padding_counts_towards_the_size_of_the_cpu_tier(tmp_path):
    cache = replace(ssd_config(tmp_path), cpu=CpuTierConfig(size_gb=10 * BLOCK_BYTES / 2**30))
    assert cache.num_cpu_blocks(MODEL) == 10 * BLOCK_BYTES // 8192
    assert replace(cache, ssd=None).num_cpu_blocks(MODEL) == 10


def in_use_elsewhere(directory: Path, ready, done) -> None:
    with StorageEngine(MODEL, ssd_config(directory)):
        ready.set()
        done.wait(60)


def test_a_directory_in_use_is_refused(tmp_path):
    with StorageEngine(MODEL, ssd_config(tmp_path)), pytest.raises(ConfigError, match="in use by process"):
        StorageEngine(MODEL, ssd_config(tmp_path))
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=in_use_elsewhere, args=(tmp_path, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ConfigError, match=f"in use by process {process.pid}"):
            StorageEngine(MODEL, ssd_config(tmp_path))
    finally:
        done.set()
        process.join(60)
    StorageEngine(MODEL, ssd_config(tmp_path)).close()


def test_storage_that_cannot_be_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    remote = {
        "scheme 'ftp'": "ftp://host/kv",
        "no option 'nonsense'": f"file://{tmp_path}/r?nonsense=1",
        "cannot": f"file://{tmp_path}/file/kv",
    }
    bad = [(message, replace(CPU_ONLY, remote=RemoteTierConfig(url))) for message, url in remote.items()]
    bad += [
        ("smaller than one block", replace(CPU_ONLY, ssd=SsdTierConfig((tmp_path / "a",), size_gb=1e-6))),
        ("at least one in each", ssd_config(tmp_path / "a", tmp_path / "b", num_blocks=1)),
        ("cannot make the SSD directory", ssd_config(tmp_path / "file" / "x")),
        ("are free there", ssd_config(tmp_path / "a", num_blocks=2**31 - 1)),
    ]
    for message, cache in bad:
        with pytest.raises(ConfigError, match=message):
            StorageEngine(MODEL, cache)
    both = replace(ssd_config(tmp_path / "a"), remote=RemoteTierConfig("ftp://host/kv"))
    with pytest.raises(ConfigError, match="ftp"):
        StorageEngine(MODEL, both)
    StorageEngine(MODEL, ssd_config(tmp_path / "a")).close()  # nothing is left open, or locked


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("flexkv.storage.remote.s3._is_installed", False)
    with pytest.raises(ConfigError, match=r"kvstrata\[s3\]"):
        StorageEngine(MODEL, replace(CPU_ONLY, remote=RemoteTierConfig("s3://bucket/prefix")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: (replace(m, model_id="other"), c), "model was 'm', is 'other'"),
        (lambda m, c: (replace(m, num_kv_heads=2, head_size=25), c), "head_size was '50', is '25'"),
        (lambda m, c: (m, replace(c, hash_seed="s")), "hash_root was"),
        (lambda m, c: (m, replace(c, hash_algorithm="sha256")), "hash_algorithm was 'sha256_cbor', is 'sha256'"),
    ],
)
def test_a_directory_of_another_model_is_refused(tmp_path, change, message):
    cache = ssd_config(tmp_path)
    StorageEngine(MODEL, cache).close()
    with pytest.raises(ConfigError, match=message):
        StorageEngine(*change(MODEL, cache))


def test_the_layout_is_pinned_by_what_is_stored(tmp_path):
    cache = ssd_config(tmp_path)
    with StorageEngine(MODEL, cache) as storage:
        storage.bind_layout("one")
        storage.bind_layout("one")
        with pytest.raises(ConfigError, match="have the layout 'one' here, not 'two'"):
            storage.bind_layout("two")
    with StorageEngine(MODEL, cache) as storage:
        storage.bind_layout("two")  # nothing is stored yet
        store_rows(storage, 1, 2)
    with StorageEngine(MODEL, cache) as storage:
        with pytest.raises(ConfigError, match="layout was 'two', is 'one'; use another directory"):
            storage.bind_layout("one")
        storage.bind_layout("two")
        assert sorted(storage.ssd.take_found().blocks.slots.tolist()) == [1, 2]


def test_fingerprints_differ_in_every_part_and_are_stable():
    seen = {
        fingerprint_text(block_fingerprint(model, cache, layout))
        for model in (
            MODEL,
            replace(MODEL, model_id="n"),
            replace(MODEL, num_layers=4),
            replace(MODEL, num_kv_heads=2),
            replace(MODEL, head_size=51),
            replace(MODEL, dtype="int8"),
            replace(MODEL, tp_size=2),
            replace(MODEL, use_mla=True),
        )
        for cache in (
            CPU_ONLY,
            replace(CPU_ONLY, tokens_per_block=32),
            replace(CPU_ONLY, hash_algorithm="sha256"),
            replace(CPU_ONLY, hash_seed="x"),
        )
        for layout in (None, "a", "b")
    }
    assert len(seen) == 8 * 4 * 3
    assert fingerprint_text({"b": "1", "a": "2"}) == fingerprint_text({"a": "2", "b": "1"}) == '{"a":"2","b":"1"}'


def test_device_workers_find_blocks_in_a_padded_pool(tmp_path):
    cache = CacheConfig(CpuTierConfig(num_blocks=4), BLOCK, ssd=SsdTierConfig((tmp_path,), num_blocks=2))
    kv_caches = make_kv_caches(DEVICE_MODEL, 8, BLOCK)
    with (
        KVManager(DEVICE_MODEL, cache) as store,
        KVTPClient(store.device_dir, 0, DEVICE_MODEL, BLOCK) as client,
    ):
        client.register(kv_caches)
        assert store.wait_ready(20.0)
        tokens = list(range(3 * BLOCK))
        for block in range(3):
            fill_block(kv_caches, block, seed=block)
        wanted = [read_block(kv_caches, block) for block in range(3)]
        assert Stack(store, client, kv_caches).put(tokens, [0, 1, 2]) == 3
        task = store.get_async(tokens, slots_of([7, 5, 6]))
        assert store.wait([task])[task].ok
    assert [read_block(kv_caches, block) for block in (7, 5, 6)] == wanted


def test_contents_of_a_run_name_their_parents():
    sequence = SequenceMeta.from_tokens(list(range(20)), 4, BlockHasher(block_size=4))
    hashes = sequence.block_hashes
    start = BlockContent.of_run(hashes, 0, 2)
    assert (start.hashes == hashes[:2]).all()
    assert not start.parents[0].any()
    assert (start.parents[1] == hashes[0]).all()
    later = BlockContent.of_run(hashes, 2, 3, ("x",))
    assert (later.hashes == hashes[2:5]).all()
    assert (later.parents == hashes[1:4]).all()
    assert (len(later), later.namespace) == (3, ("x",))
    assert len(BlockContent.of_run(hashes, 5, 0)) == 0


def test_an_op_to_a_remote_store_is_bound_by_its_content():
    graph = TransferOpGraph()
    graph.add_op(TransferOp(TransferType.H2REMOTE, ids([1, 2]), content=content_of([1, 2])))
    assert graph.is_bound
    graph.add_op(TransferOp(TransferType.REMOTE2H, dst_block_ids=ids([1, 2]), content=content_of([1])))
    assert not graph.is_bound
