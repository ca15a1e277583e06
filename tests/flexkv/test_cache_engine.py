from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from flexkv.cache.cache_engine import CacheEngine
from flexkv.cache.eviction import num_blocks_to_evict
from flexkv.common.config import EvictionConfig
from flexkv.errors import CacheStateError, ConfigError


def digests(*names: object) -> npt.NDArray[np.uint8]:
    rows = [hashlib.sha256(repr(names[: i + 1]).encode()).digest() for i in range(len(names))]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(names), 32)


def run(name: str, count: int) -> npt.NDArray[np.uint8]:
    return digests(name, *range(count - 1))


def engine(num_blocks: int, evict_ratio: float = 0.0, start_threshold: float = 1.0) -> CacheEngine:
    return CacheEngine(num_blocks, 32, EvictionConfig(evict_ratio=evict_ratio, start_threshold=start_threshold))


def store(tier: CacheEngine, sequence: npt.NDArray[np.uint8]) -> int:
    """Store what there is room for; returns how many blocks that were."""
    prefix = tier.lock_prefix(sequence, ready_only=False)
    inserted = tier.insert(prefix.handle, sequence[prefix.num_blocks :])
    if inserted is None:
        tier.unlock(prefix.handle)
        return 0
    tier.set_ready(inserted.handle, len(inserted.block_ids))
    tier.unlock(inserted.handle)
    tier.check_integrity()
    return len(inserted.block_ids)


def test_a_sequence_larger_than_the_pool_is_stored_in_part() -> None:
    tier = engine(8)
    sequence = run("a", 20)
    assert store(tier, sequence) == 8
    assert tier.match(sequence) == (8, 8)
    assert tier.num_free == 0


def test_a_full_pool_gives_its_oldest_blocks_to_a_new_sequence() -> None:
    tier = engine(8)
    store(tier, run("a", 4))
    store(tier, run("b", 4))
    assert store(tier, run("c", 6)) == 6
    assert tier.match(run("a", 4)).num_ready == 0
    assert tier.match(run("b", 4)).num_ready == 2


def test_evicted_blocks_are_named() -> None:
    tier = engine(4)
    store(tier, run("a", 4))
    prefix = tier.lock_prefix(run("b", 3), ready_only=False)
    inserted = tier.insert(prefix.handle, run("b", 3))
    assert inserted is not None
    assert {row.tobytes() for row in inserted.evicted} == {row.tobytes() for row in run("a", 4)[1:]}


def test_a_locked_prefix_and_its_ancestors_are_never_evicted() -> None:
    tier = engine(8)
    store(tier, digests("root", "left", "leaf"))
    store(tier, digests("root", "right"))
    held = tier.lock_prefix(digests("root", "left"), ready_only=True)
    blocks = tier.block_ids(held.handle, 0, 2).tolist()
    assert len(tier.evict(8)) == 2
    assert tier.match(digests("root", "left", "leaf")).num_ready == 2
    assert store(tier, run("other", 8)) == 6
    assert tier.block_ids(held.handle, 0, 2).tolist() == blocks
    tier.unlock(held.handle)


def test_unready_blocks_are_never_evicted() -> None:
    tier = engine(4)
    prefix = tier.lock_prefix(run("a", 4), ready_only=False)
    inserted = tier.insert(prefix.handle, run("a", 4))
    assert inserted is not None
    assert store(tier, run("b", 2)) == 0
    assert tier.match(run("a", 4)) == (4, 0)


def test_the_prefix_of_a_put_is_not_evicted_for_its_tail() -> None:
    tier = engine(8)
    store(tier, run("a", 6))
    assert store(tier, run("a", 20)) == 2
    assert tier.match(run("a", 20)).num_ready == 8


def test_a_prefix_that_was_used_outlives_its_unused_tail() -> None:
    tier = engine(8)
    store(tier, run("a", 6))
    store(tier, run("b", 2))
    tier.unlock(tier.lock_prefix(run("a", 3), ready_only=True).handle)
    store(tier, run("c", 5))
    assert tier.match(run("a", 6)).num_ready == 3
    assert tier.match(run("b", 2)).num_ready == 0


def test_freeing_blocks_twice_is_refused() -> None:
    tier = engine(4)
    prefix = tier.lock_prefix(run("a", 1), ready_only=False)
    tier.unlock(prefix.handle)
    with pytest.raises(CacheStateError, match="not locked"):
        tier.unlock(prefix.handle)


@pytest.mark.parametrize(
    ("ratio", "threshold", "needed", "num_free", "expected"),
    [
        (0.0, 1.0, 10, 10, 0),
        (0.0, 1.0, 10, 4, 6),
        (0.1, 1.0, 10, 9, 10),
        (0.1, 1.0, 10, 10, 0),
        (0.0, 0.9, 10, 15, 5),
        (0.0, 0.9, 10, 20, 0),
        (1.0, 1.0, 1, 0, 100),
    ],
)
def test_eviction_starts_at_the_threshold_and_takes_at_least_the_ratio(
    ratio: float, threshold: float, needed: int, num_free: int, expected: int
) -> None:
    config = EvictionConfig(evict_ratio=ratio, start_threshold=threshold)
    assert num_blocks_to_evict(config, needed, num_free, 100) == expected


def test_an_unknown_digest_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="not 6"):
        CacheEngine(4, 6, EvictionConfig())
