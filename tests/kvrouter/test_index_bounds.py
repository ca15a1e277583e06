"""What the in-memory index does when it is full, and what it says about itself."""

from __future__ import annotations

import numpy as np
import pytest

from kvrouter.errors import ConfigError, InvalidKeysError
from kvrouter.kvblock.base import PodEntry
from kvrouter.kvblock.in_memory import InMemoryIndex

A, B, C = PodEntry("A"), PodEntry("B"), PodEntry("C")


def test_full_index_drops_the_key_that_was_not_used() -> None:
    index = InMemoryIndex(size=2)
    index.add(None, [1], [A])
    index.add(None, [2], [A])
    assert index.lookup([1]) == {1: [A]}
    index.add(None, [3], [A])
    assert index.lookup([1]) == {1: [A]}
    assert index.lookup([2]) == {}
    assert index.lookup([3]) == {3: [A]}
    assert index.stats().num_evicted == 1


def test_full_index_never_exceeds_its_size() -> None:
    index = InMemoryIndex(size=1000)
    rng = np.random.default_rng(0)
    for _ in range(20):
        index.add(None, rng.integers(0, 2**63, 700).astype(np.uint64), [A, B])
        assert index.stats().num_blocks <= 1000
    assert index.stats().num_blocks == 1000
    index.clear("A")
    index.clear("B")
    assert index.stats().num_blocks == index.stats().num_records == 0


def test_key_with_too_many_holders_drops_the_oldest() -> None:
    index = InMemoryIndex(pod_cache_size=2)
    for entry in (A, B, A, C):  # A is the youngest but one
        index.add(None, [1], [entry])
    assert index.lookup([1]) == {1: [A, C]}
    index.evict(1, [B])
    index.evict(1, [C])
    assert index.lookup([1]) == {1: [A]}


def test_holder_that_was_dropped_may_come_back() -> None:
    index = InMemoryIndex(pod_cache_size=1)
    index.add([50], [1], [A])
    index.add([51], [1], [B])
    index.evict(50, [A])
    assert index.lookup([1]) == {1: [B]}
    index.add([50], [1], [A])
    assert index.lookup([1]) == {1: [A]}


def test_what_was_dropped_for_room_returns_when_it_is_stored_again() -> None:
    index = InMemoryIndex(size=1, pod_cache_size=1)
    index.add(None, [1], [A])
    index.add(None, [1], [B])
    index.add(None, [1], [A])
    assert index.lookup([1]) == {1: [A]}
    index.add(None, [2], [A])
    index.add(None, [1], [A])
    assert index.lookup([1]) == {1: [A]}


def test_evictions_of_keys_dropped_for_room_are_harmless() -> None:
    index = InMemoryIndex(size=1)
    index.add([50], [1], [A])
    index.add([51], [2], [A])
    index.evict(50, [A])
    assert index.lookup([2]) == {2: [A]}
    assert index.stats().num_records == 1


def test_memory_per_record_stays_within_its_budget() -> None:
    index = InMemoryIndex()
    keys = np.random.default_rng(0).integers(0, 2**63, 100_000).astype(np.uint64)
    index.add(None, keys, [A])
    assert index.stats().memory_bytes / index.stats().num_records < 70
    for pod in "BCDEFGH":
        index.add(None, keys, [PodEntry(pod)])
    assert index.stats().memory_bytes / index.stats().num_records < 40


@pytest.mark.parametrize(("size", "pod_cache_size"), [(0, 1), (1, 0), (2**27, 1), ("1", 1), (True, 1)])
def test_bad_bounds_are_refused(size: int, pod_cache_size: int) -> None:
    with pytest.raises(ConfigError, match="is an int in 1"):
        InMemoryIndex(size=size, pod_cache_size=pod_cache_size)


def test_engine_key_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidKeysError):
        InMemoryIndex().get_request_key(2**64)
