"""The default index: one native table in this process, see csrc/kvrouter/block_index.h for its layout and locks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvrouter import _native
from kvrouter.errors import ConfigError, InvalidKeysError
from kvrouter.kvblock.base import (
    DEFAULT_TIER_WEIGHTS,
    UNKNOWN_TIER_WEIGHT,
    ApplyResult,
    EventApplier,
    Index,
    Keys,
    PodEntry,
    as_key_array,
)
from kvrouter.kvblock.token_processor import TokenProcessor

_MAX_KEY = 2**64 - 1


@dataclass(frozen=True, slots=True)
class IndexStats:
    """How full an index is.

    Attributes:
        num_blocks: distinct request keys held.
        num_records: (engine key, holder) records.
        memory_bytes: memory of the index's tables.
        num_evicted: blocks dropped so far because the index was full.
    """

    num_blocks: int
    num_records: int
    memory_bytes: int
    num_evicted: int


class InMemoryIndex(Index):
    """Holds at most `size` keys with `pod_cache_size` holders each; a full index drops what was not used lately.

    Which key goes is chosen by second chance: a block that a lookup or a store used since the last pass stays. Of the
    holders of one key, the one that stored it the longest ago goes.
    """

    def __init__(self, size: int = 100_000_000, pod_cache_size: int = 10) -> None:
        """Make an empty index; memory grows with what it holds, not with `size`.

        Raises:
            ConfigError: a bound out of range.
        """
        for name, value in (("size", size), ("pod_cache_size", pod_cache_size)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _native.MAX_BLOCKS:
                raise ConfigError(f"{name} is an int in 1..{_native.MAX_BLOCKS}, not {value!r}")
        self._native = _native.BlockIndex(size, pod_cache_size)
        self._entries: dict[int, PodEntry] = {}  # owner id -> entry; ids never change their meaning
        self._default_weights = tuple(DEFAULT_TIER_WEIGHTS.items())

    def add(self, engine_keys: Keys | None, request_keys: Keys, entries: Sequence[PodEntry]) -> None:
        """Record that every entry holds every block; see `Index.add`."""
        request = as_key_array(request_keys)
        engine = request if engine_keys is None else as_key_array(engine_keys, "engine_keys")
        engine, request, parts = _pair_keys(engine, request)
        for entry in entries:
            self._native.add(entry.pod, entry.tier, entry.group, entry.rank, engine, request, parts)

    def evict(self, engine_key: int, entries: Sequence[PodEntry]) -> None:
        """Take back one add for each entry; see `Index.evict`."""
        key = as_key_array([engine_key], "engine_key")
        for entry in entries:
            self._native.evict(entry.pod, entry.tier, entry.group, entry.rank, key)

    def clear(self, pod: str, rank: int | None = None) -> int:
        """Forget every block of the pod; see `Index.clear`."""
        return self._native.clear(pod, rank)

    def lookup(self, request_keys: Keys, pods: Sequence[str] | None = None) -> dict[int, list[PodEntry]]:
        """Return the holders of each key; see `Index.lookup`."""
        keys = as_key_array(request_keys)
        found: dict[int, list[PodEntry]] = {}
        start = 0
        for num_keys, owner_ids in self._native.lookup(keys, pods):
            holders = [self._entry(owner_id) for owner_id in owner_ids]
            for key in keys[start : start + num_keys].tolist():
                found[key] = holders.copy()
            start += num_keys
        return found

    def score(
        self, request_keys: Keys, pods: Sequence[str] | None = None, weights: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Return each pod's score; see `Index.score`."""
        tier_weights = self._default_weights if weights is None else tuple(weights.items())
        return self._native.score(as_key_array(request_keys), pods, tier_weights, UNKNOWN_TIER_WEIGHT)

    def get_request_key(self, engine_key: int) -> int | None:
        """Return the request key of an engine key; see `Index.get_request_key`."""
        if not 0 <= engine_key <= _MAX_KEY:
            raise InvalidKeysError(f"engine_key is an integer in 0..2**64-1, not {engine_key!r}")
        return self._native.request_key(engine_key)

    def event_applier(self, token_processor: TokenProcessor) -> EventApplier:
        """Return the native applier: one call from msgpack bytes to the index."""
        return _NativeEventApplier(self._native, token_processor)

    def stats(self) -> IndexStats:
        """Return how full the index is."""
        return IndexStats(*self._native.stats())

    def _entry(self, owner_id: int) -> PodEntry:
        entry = self._entries.get(owner_id)
        if entry is None:
            entry = self._entries[owner_id] = PodEntry(*self._native.owner(owner_id))
        return entry


class _NativeEventApplier:
    def __init__(self, index: _native.BlockIndex, token_processor: TokenProcessor) -> None:
        self._index = index
        self._token_processor = token_processor
        self._appliers: dict[tuple[str, str], _native.EventApplier] = {}

    def apply(self, pod: str, model: str, payload: bytes) -> ApplyResult:
        applier = self._appliers.get((pod, model)) or self._make(pod, model)
        num_events, num_stored, num_removed, num_cleared, rank, counts = applier.apply(payload)
        if counts is None:
            return ApplyResult(num_events, num_stored, num_removed, num_cleared, rank)
        rejected = {name: count for name, count in zip(_native.REJECTIONS, counts, strict=True) if count}
        return ApplyResult(num_events, num_stored, num_removed, num_cleared, rank, rejected)

    def _make(self, pod: str, model: str) -> _native.EventApplier:
        scheme = self._token_processor
        made = _native.EventApplier(self._index, pod, model, scheme.algorithm, scheme.root(model), scheme.block_size)
        return self._appliers.setdefault((pod, model), made)


def _pair_keys(
    engine: npt.NDArray[np.uint64], request: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], list[int]]:
    """Return engine key, request key and part of every record of an `add`."""
    if len(engine) == len(request):
        return engine, request, [0] * len(request)
    num_parts, rest = divmod(len(request), max(1, len(engine)))
    if 1 <= num_parts <= _native.MAX_PARTS and not rest and len(engine):
        return np.repeat(engine, num_parts), request, list(range(num_parts)) * len(engine)
    if 0 < len(request) < len(engine) and len(engine) % len(request) == 0:
        step = len(engine) // len(request)
        return np.ascontiguousarray(engine[step - 1 :: step]), request, [0] * len(request)
    raise InvalidKeysError(
        f"{len(engine)} engine keys do not go with {len(request)} request keys: one number must be a multiple of the "
        f"other, and an engine block covers at most {_native.MAX_PARTS} keys"
    )
