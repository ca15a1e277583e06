"""Options come from file, environment and engine; bad ones are refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.flexkv.fake_engine import engine_config

from flexkv.common.config import (
    CacheConfig,
    CpuTierConfig,
    Durability,
    EvictionConfig,
    ModelConfig,
    RemoteTierConfig,
    ResilienceConfig,
    SsdTierConfig,
    TransferConfig,
)
from flexkv.errors import ConfigError
from flexkv.integration.config import FlexKVConfig, config_for_engine

HERE = Path("here")
MODEL = ModelConfig(num_layers=2, num_kv_heads=4, head_size=64, dtype="bfloat16", tp_size=2)


def with_remote(**options) -> CacheConfig:
    return CacheConfig(CpuTierConfig(1.0), remote=RemoteTierConfig("file:///a"), **options)


def test_block_bytes_count_every_rank():
    assert MODEL.rank_block_bytes(16) == 2 * 2 * 4 * 64 * 16 * 2
    assert MODEL.block_bytes(16) == 2 * MODEL.rank_block_bytes(16)


def test_a_tier_holds_whole_blocks():
    config = CacheConfig(CpuTierConfig(size_gb=MODEL.block_bytes(16) * 3.9 / 2**30))
    assert config.num_cpu_blocks(MODEL) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CpuTierConfig(), "either size_gb or num_blocks"),
        (lambda: CpuTierConfig(1.0, 5), "either size_gb or num_blocks"),
        (lambda: CpuTierConfig(size_gb=-1), "size_gb=-1"),
        (lambda: CpuTierConfig(num_blocks=0), "num_blocks=0"),
        (lambda: EvictionConfig(policy="random"), "one of lru, lfu, fifo, mru, slru"),
        (lambda: EvictionConfig(evict_ratio=2), "evict_ratio=2"),
        (lambda: TransferConfig(num_copy_threads=0), "num_copy_threads=0"),
        (lambda: ModelConfig(0, 1, 1, "float32"), "num_layers=0"),
        (lambda: ModelConfig(1, 1, 1, "int3"), "dtype='int3'"),
        (lambda: CacheConfig(CpuTierConfig(1.0), tokens_per_block=0), "tokens_per_block=0"),
        (lambda: CacheConfig(CpuTierConfig(1.0), hash_algorithm="md5"), "hash_algorithm='md5'"),
        (lambda: CacheConfig(CpuTierConfig(1e-9)).num_cpu_blocks(MODEL), "smaller than one block"),
        (lambda: CacheConfig(CpuTierConfig(1e9)).num_cpu_blocks(MODEL), "the machine has"),
        (lambda: SsdTierConfig((), 1.0), r"directories=\(\)"),
        (lambda: SsdTierConfig("/a", 1.0), "directories='/a'"),
        (lambda: SsdTierConfig((HERE,)), "the SSD tier takes either size_gb or num_blocks"),
        (lambda: SsdTierConfig((HERE,), -1.0), "size_gb=-1"),
        (lambda: SsdTierConfig((HERE,), 1.0, durability="power"), "durability='power'"),
        (lambda: SsdTierConfig((HERE,), 1.0, backend="dma"), "one of auto, io_uring, threads"),
        (lambda: SsdTierConfig((HERE,), 1.0, queue_depth=0), "queue_depth=0"),
        (lambda: SsdTierConfig((HERE,), 1.0, io_bytes=5000), "io_bytes=5000.*multiple of 4096"),
        (lambda: SsdTierConfig((HERE,), 1.0, num_threads=True), "num_threads=True"),
        (lambda: RemoteTierConfig("somewhere"), "scheme://place"),
        (lambda: RemoteTierConfig("file:///a", namespace=""), "namespace=''"),
        (lambda: RemoteTierConfig("file:///a", write="some"), "one of all, none"),
        (lambda: RemoteTierConfig("file:///a", get_deadline_s=0), "get_deadline_s=0"),
        (lambda: RemoteTierConfig("file:///a", put_deadline_s=float("inf")), "put_deadline_s=inf"),
        (lambda: RemoteTierConfig("file:///a", num_get_threads=65), "num_get_threads=65"),
        (lambda: with_remote(hash_algorithm="xxhash"), "hash_algorithm='xxhash'.*sha256_cbor with an SSD or remote"),
    ],
)
def test_bad_values_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_later_sources_override_earlier_ones(tmp_path):
    path = tmp_path / "flexkv.yaml"
    path.write_text("cpu_cache_gb: 2\nevict_ratio: 0.5\n")
    env = {"FLEXKV_CONFIG_PATH": str(path), "FLEXKV_CPU_CACHE_GB": "3.5", "ENABLE_FLEXKV": "0", "PATH": "/bin"}
    config = FlexKVConfig.from_env(env)
    assert (config.cpu_cache_gb, config.evict_ratio, config.enabled) == (3.5, 0.5, False)
    assert config.override({"enabled": True}, "test").enabled


def test_a_json_file_is_read_too(tmp_path):
    path = tmp_path / "flexkv.json"
    path.write_text(json.dumps({"cpu_cache_gb": 1.5}))
    assert FlexKVConfig.from_file(path).cpu_cache_gb == 1.5


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FLEXKV_CPU_CACH_GB": "1"}, "FLEXKV_CPU_CACH_GB.*did you mean FLEXKV_CPU_CACHE_GB"),
        ({"FLEXKV_CPU_CACHE_GB": "much"}, "FLEXKV_CPU_CACHE_GB='much'"),
        ({"FLEXKV_CONFIG_PATH": "/nonexistent.yaml"}, "cannot be read"),
        ({"ENABLE_FLEXKV": "perhaps"}, "ENABLE_FLEXKV"),
    ],
)
def test_a_bad_environment_is_refused_by_name(env, message):
    with pytest.raises(ConfigError, match=message):
        FlexKVConfig.from_env(env)


def test_tiers_are_absent_unless_they_are_asked_for():
    cache = FlexKVConfig.from_env({}).cache_config(16)
    assert (cache.ssd, cache.remote) == (None, None)


def test_every_option_of_the_tiers_is_honoured():
    env = {
        "SSD_CACHE_GB": "1.5",
        "SSD_CACHE_DIR": "/a;/b;",
        "SSD_DURABILITY": "power",
        "SSD_BACKEND": "threads",
        "SSD_QUEUE_DEPTH": "7",
        "SSD_IO_BYTES": "8192",
        "SSD_NUM_THREADS": "3",
        "SSD_REGISTER_MEMORY": "0",
        "SSD_DIRECT": "false",
        "REMOTE_URL": "redis://:secret@host",
        "REMOTE_NAMESPACE": "team",
        "REMOTE_WRITE": "none",
        "REMOTE_GET_DEADLINE_S": "0.5",
        "REMOTE_PUT_DEADLINE_S": "2",
        "REMOTE_NUM_GET_THREADS": "5",
        "REMOTE_NUM_PUT_THREADS": "6",
        "REMOTE_MAX_RETRIES": "0",
        "REMOTE_BACKOFF_S": "0.25",
        "REMOTE_MAX_BACKOFF_S": "0.75",
        "REMOTE_FAILURE_LIMIT": "9",
        "REMOTE_COOLDOWN_S": "11",
    }
    options = FlexKVConfig.from_env({f"FLEXKV_{name}": value for name, value in env.items()})
    untouched = [f for f in FlexKVConfig.__slots__ if f.upper() not in env and f.startswith(("ssd_", "remote_"))]
    assert untouched == [], "an option that this test leaves out"
    cache = options.cache_config(16)
    directories = (Path("/a"), Path("/b"))
    assert cache.ssd == SsdTierConfig(directories, 1.5, None, Durability.POWER, "threads", 7, 8192, 3, False, False)
    resilience = ResilienceConfig(0, 0.25, 0.75, 9, 11.0)
    assert cache.remote == RemoteTierConfig("redis://:secret@host", "team", "none", 0.5, 2.0, 5, 6, resilience)
    assert "secret" not in f"{options} {cache}"


def test_ranks_of_data_parallel_engines_have_ssd_directories_of_their_own():
    engine = engine_config("x", ssd_cache_gb=1, ssd_cache_dir="/a")
    engine.parallel_config = SimpleNamespace(tensor_parallel_size=1, data_parallel_rank=1, data_parallel_size=2, rank=0)
    config = config_for_engine(engine).post_init_from_vllm_config(engine)
    assert config.cache.ssd.directories == (Path("/a/dp-1"),)
    assert config.cache.ssd == replace(config.cache.ssd, size_gb=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssd_cache_gb": 1}, "ssd_cache_dir is missing"),
        ({"ssd_cache_dir": "/a"}, "ssd_cache_gb is missing"),
        ({"ssd_cache_gb": 0, "ssd_cache_dir": "/a"}, "ssd_cache_gb=0"),
        ({"ssd_cache_gb": 1, "ssd_cache_dir": ";"}, "ssd_cache_dir="),
        ({"ssd_cache_gb": 1, "ssd_cache_dir": "/a", "ssd_durability": "none"}, "ssd_durability='none'.*process, power"),
        ({"ssd_cache_gb": 1, "ssd_cache_dir": "/a", "ssd_backend": "x"}, "ssd_backend='x'"),
        ({"ssd_direct": False}, "ssd_direct is given without ssd_cache_gb"),
        ({"remote_write": "none"}, "remote_write is given without remote_url"),
        ({"remote_url": "x"}, "remote_url is not allowed"),
        ({"remote_url": "file:///a", "remote_cooldown_s": -1}, "remote_cooldown_s=-1"),
    ],
)
def test_bad_options_of_tiers_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        FlexKVConfig().override(options, "test").cache_config(16)


@pytest.mark.parametrize(("text", "message"), [("- a", "no mapping"), ("a: [", "cannot be read"), ("zzz: 1", "zzz")])
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "flexkv.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        FlexKVConfig.from_file(path)


def test_both_halves_resolve_to_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    engine = engine_config("engine-1", cpu_cache_gb=0.5)
    first, second = (config_for_engine(engine).post_init_from_vllm_config(engine) for _ in range(2))
    assert first == second
    assert first.store_key == "engine-1"
    assert first.runtime_dir == tmp_path / "kvstrata"
    assert first.cache.cpu.size_gb == 0.5
    assert first.model.dtype == "float32"


def test_engines_without_an_id_are_told_apart():
    engines = [engine_config(""), engine_config("")]
    keys = {config_for_engine(e).post_init_from_vllm_config(e).store_key for e in engines}
    assert len(keys) == 2


def test_what_an_engine_says_is_taken_over():
    engine = engine_config("x", role="kv_consumer")
    engine.parallel_config = SimpleNamespace(tensor_parallel_size=2, data_parallel_rank=3, rank=5)
    engine.model_config.dtype = torch.bfloat16
    engine.cache_config.cache_dtype = "fp8_e4m3"
    config = config_for_engine(engine).post_init_from_vllm_config(engine)
    assert (config.rank, config.dp_rank, config.model.tp_size, config.model.dtype) == (1, 3, 2, "uint8")
    assert (config.can_load, config.can_save) == (True, False)
    engine.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ConfigError, match="pipeline_parallel_size"):
        config_for_engine(engine).post_init_from_vllm_config(engine)
