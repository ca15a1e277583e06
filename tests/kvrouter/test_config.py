"""The configuration document: llm-d's names, defaults, and what is refused."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter.config import IndexerConfig, PodConfig, RouterConfig, load_config, parse_pod
from kvrouter.config_parser import parse_config, parse_duration
from kvrouter.errors import ConfigError

DOCUMENT = {
    "tokenProcessorConfig": {"blockSize": 32, "hashSeed": "7"},
    "kvBlockIndexConfig": {"inMemoryConfig": {"size": 1e6, "podCacheSize": 4}},
    "tokenizersPoolConfig": {
        "workersCount": 2,
        "timeout": "1m0s",
        "local": {"modelTokenizerMap": {"Qwen/Qwen3-0.6B": "/models/qwen"}},
    },
    "kvEventsConfig": {"concurrency": 8},
    "kvCacheBackendConfigs": [{"name": "GPU", "weight": 1}, {"name": "cpu", "weight": 0.25}],
    "proxyConfig": {"policy": "round_robin", "healthInterval": "250ms"},
    "pods": [{"name": "a", "url": "http://h:1", "eventsEndpoint": "tcp://h:2", "replayEndpoint": "tcp://h:3"}],
}
YAML = """
tokenProcessorConfig: {blockSize: 32}
proxyConfig:
  idleTimeout: 1h30m
pods:
  - {name: a, url: "http://h:1"}
"""


def test_document_with_llm_d_names_is_read() -> None:
    config = load_config(dict(DOCUMENT))
    assert (config.token_processor_config.block_size, config.token_processor_config.hash_seed) == (32, "7")
    assert config.kv_block_index_config.in_memory_config.size == 1_000_000
    assert config.tokenizers_pool_config.timeout == 60.0
    assert config.tokenizers_pool_config.local.model_tokenizer_map == {"Qwen/Qwen3-0.6B": "/models/qwen"}
    assert config.kv_events_config.concurrency == 8
    assert config.tier_weights() == {"gpu": 1.0, "cpu": 0.25}
    assert config.proxy_config.health_interval == 0.25
    assert config.pods == (PodConfig("a", "http://h:1", None, "tcp://h:2", "tcp://h:3"),)


def test_absent_keys_keep_llm_d_defaults() -> None:
    config = load_config({})
    assert config == RouterConfig()
    assert (config.token_processor_config.block_size, config.token_processor_config.hash_seed) == (16, "")
    memory = config.kv_block_index_config.in_memory_config
    assert (memory.size, memory.pod_cache_size) == (100_000_000, 10)
    assert (config.tokenizers_pool_config.workers_count, config.kv_events_config.concurrency) == (5, 4)
    assert config.tier_weights() == {"gpu": 1.0, "cpu": 0.8, "storage": 0.5}


def test_file_json_text_and_yaml_text_are_read(tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    file.write_text(json.dumps(DOCUMENT))
    assert load_config(file) == load_config(json.dumps(DOCUMENT)) == load_config(dict(DOCUMENT))
    config = load_config(YAML)
    assert config.token_processor_config.block_size == 32
    assert config.proxy_config.idle_timeout == 5400.0


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RouterConfig().pods = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"tokenProcesorConfig": {}}, ["'tokenProcesorConfig'", "nearest is 'tokenProcessorConfig'"]),
        (
            {"tokenProcessorConfig": {"blocksize": 4}},
            ["'blocksize' in tokenProcessorConfig", "'blockSize'"],
        ),
        ({"tokenProcessorConfig": {"blockSize": 4, "block_size": 4}}, ["blockSize is given twice"]),
        ({"tokenProcessorConfig": {"blockSize": 0}}, ["tokenProcessorConfig.blockSize is at least 1", "0"]),
        ({"tokenProcessorConfig": {"blockSize": 2.5}}, ["blockSize is a whole number", "2.5"]),
        ({"tokenProcessorConfig": {"blockSize": True}}, ["whole number"]),
        ({"tokenProcessorConfig": {"hashSeed": 42}}, ["hashSeed is text"]),
        ({"tokenProcessorConfig": [1]}, ["tokenProcessorConfig is a mapping"]),
        ({"kvCacheBackendConfigs": {"name": "gpu"}}, ["kvCacheBackendConfigs is a list"]),
        ({"kvCacheBackendConfigs": [{"weight": 1}]}, ["kvCacheBackendConfigs[0].name is required"]),
        ({"kvCacheBackendConfigs": [{"name": "gpu", "weight": -1}]}, ["weight is at least 0"]),
        ({"proxyConfig": {"policy": "fastest"}}, ["kv_aware, round_robin", "'fastest'"]),
        ({"proxyConfig": {"idleTimeout": "soon"}}, ["proxyConfig.idleTimeout is a duration", "'soon'"]),
        ({"proxyConfig": {"idleTimeout": 0}}, ["idleTimeout is at least"]),
        ({"tokenizersPoolConfig": {"local": {"modelTokenizerMap": {"m": 1}}}}, ["modelTokenizerMap.m is text"]),
        ({"pods": [{"name": "a", "url": "h:1"}]}, ["pod a", "http://host:port", "'h:1'"]),
        ({"pods": [{"name": "a", "url": "http://h:99999"}]}, ["http://host:port"]),
        ({"pods": [{"name": "a@b", "url": "http://h"}]}, ["'a@b'"]),
        ({"pods": [{"name": "a", "url": "http://h", "eventsEndpoint": "h:5"}]}, ["eventsEndpoint", "tcp://"]),
        ({"pods": [{"name": "a", "url": "http://h", "replayEndpoint": "tcp://h:5"}]}, ["needs an eventsEndpoint"]),
        ({"pods": [{"name": "a", "url": "http://h"}] * 2}, ["names are unique", "a"]),
    ],
)
def test_what_is_not_allowed_is_named(document: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(document)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "{a: [}", "\t- x"])
def test_text_that_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(text)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1, 1.0),
        (0.5, 0.5),
        ("90", 90.0),
        ("1m0s", 60.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("2us", 2e-6),
    ],
)
def test_duration_is_read(value: object, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), True, None, "", "1x", "s", "1 m", "m1", [], "1m-3s"])
def test_bad_duration_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(value)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_duration_adds_its_parts(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == 3600 * hours + 60 * minutes + seconds


def test_pod_argument_is_a_pair_or_json() -> None:
    assert parse_pod("a=http://h:1/") == PodConfig("a", "http://h:1/")
    document = {"name": "a", "url": "http://h:1", "events_endpoint": "ipc:///x", "replayEndpoint": "ipc:///y"}
    assert parse_pod(json.dumps(document)) == PodConfig("a", "http://h:1", None, "ipc:///x", "ipc:///y")


@pytest.mark.parametrize(
    "text", ["http", "{", '{"name": "a"}', '{"name": "a", "uri": "http://h"}', "a=ftp://h", "=http://h"]
)
def test_bad_pod_argument_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_pod(text)


def test_indexer_config_refuses_the_routers_keys() -> None:
    with pytest.raises(ConfigError, match="unknown key 'pods'"):
        parse_config(IndexerConfig, {"pods": []})
