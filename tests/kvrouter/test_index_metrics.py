"""What the index reports to Prometheus, and that keys are made the one way."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvblocks.hashing import BlockHasher, external_hash
from kvrouter.errors import ConfigError
from kvrouter.kvblock.base import PodEntry
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.instrumented_index import InstrumentedIndex
from kvrouter.kvblock.token_processor import TokenProcessor
from kvrouter.kvevents.counters import EventCounters
from kvrouter.metrics.collector import EventPathCollector, IndexMetrics


def test_metrics_count_what_the_index_does() -> None:
    registry = CollectorRegistry()
    index = InstrumentedIndex(InMemoryIndex(), IndexMetrics(registry))
    index.add(None, [1, 2, 3], [PodEntry("A")])
    index.add(None, [1], [PodEntry("B")])
    index.lookup([1, 2, 9])
    index.score([1, 2, 3])
    index.evict(3, [PodEntry("A")])
    expected = {
        "kvcache_index_admissions_total": 4.0,
        "kvcache_index_evictions_total": 1.0,
        "kvcache_index_lookup_requests_total": 2.0,
        "kvcache_index_lookup_hits_total": 5.0,
        "kvcache_index_max_pod_hit_count_total": 5.0,
        "kvcache_index_lookup_latency_seconds_count": 2.0,
    }
    assert {name: registry.get_sample_value(name) for name in expected} == expected


def test_event_path_is_read_when_scraped() -> None:
    registry, counters = CollectorRegistry(), EventCounters()
    EventPathCollector(registry, counters.snapshot, lambda: {"a": "live"}, lambda: {"blocks": 7})
    counters.add("gaps", 2)
    text = generate_latest(registry).decode()
    assert 'kvcache_events_total{kind="gaps"} 2.0' in text
    assert 'kvcache_pod_state{pod="a",state="live"} 1.0' in text
    assert "kvcache_index_blocks 7.0" in text


def test_keys_are_the_chained_hash_of_the_engines_where_seeds_agree() -> None:
    tokens = np.arange(100, dtype=np.uint32)
    expected = [external_hash(h) for h in BlockHasher("sha256_cbor", "42").hash_blocks(tokens)]
    assert TokenProcessor(hash_seed="42").keys(tokens, "").tolist() == expected
    assert TokenProcessor(hash_seed="42").keys(tokens.tolist(), "").tolist() == expected


def test_keys_differ_by_model_seed_salt_and_adapter() -> None:
    tokens = list(range(32))
    processor = TokenProcessor()
    keys = [
        processor.keys(tokens, "m"),
        processor.keys(tokens, "n"),
        processor.keys(tokens, "m", "salt"),
        processor.keys(tokens, "m", None, "lora"),
        TokenProcessor(hash_seed="other").keys(tokens, "m"),
        TokenProcessor(algorithm="xxhash_cbor").keys(tokens, "m"),
    ]
    assert len({key for row in keys for key in row.tolist()}) == 12
    assert processor.keys(tokens, "m", "").tolist() == keys[0].tolist()
    assert processor.keys(tokens[:15], "m").tolist() == []


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"block_size": "16"}, {"hash_seed": 1}, {"algorithm": "md5"}, {"algorithm": "sha256"}],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TokenProcessor(**options)
