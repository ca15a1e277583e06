"""An index that measures another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvrouter.kvblock.base import ApplyResult, EventApplier, Index, Keys, PodEntry
from kvrouter.kvblock.token_processor import TokenProcessor
from kvrouter.metrics.collector import IndexMetrics


class InstrumentedIndex(Index):
    """Behaves as the index it wraps, and feeds `IndexMetrics`."""

    def __init__(self, inner: Index, metrics: IndexMetrics) -> None:
        """Wrap `inner`."""
        self._inner = inner
        self._metrics = metrics

    def add(self, engine_keys: Keys | None, request_keys: Keys, entries: Sequence[PodEntry]) -> None:
        """See `Index.add`."""
        self._inner.add(engine_keys, request_keys, entries)
        self._metrics.admissions.inc(len(request_keys) * len(entries))

    def evict(self, engine_key: int, entries: Sequence[PodEntry]) -> None:
        """See `Index.evict`."""
        self._inner.evict(engine_key, entries)
        self._metrics.evictions.inc(len(entries))

    def clear(self, pod: str, rank: int | None = None) -> int:
        """See `Index.clear`."""
        num_records = self._inner.clear(pod, rank)
        self._metrics.evictions.inc(num_records)
        return num_records

    def lookup(self, request_keys: Keys, pods: Sequence[str] | None = None) -> dict[int, list[PodEntry]]:
        """See `Index.lookup`."""
        with self._metrics.lookup_latency.time():
            found = self._inner.lookup(request_keys, pods)
        hits_by_pod: dict[str, int] = {}
        for entries in found.values():
            for pod in {entry.pod for entry in entries}:
                hits_by_pod[pod] = hits_by_pod.get(pod, 0) + 1
        self._count_lookup(len(found), max(hits_by_pod.values(), default=0))
        return found

    def score(
        self, request_keys: Keys, pods: Sequence[str] | None = None, weights: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """See `Index.score`; counts the best score, rounded down, as hits."""
        with self._metrics.lookup_latency.time():
            scores = self._inner.score(request_keys, pods, weights)
        best = int(max(scores.values(), default=0.0))
        self._count_lookup(best, best)
        return scores

    def get_request_key(self, engine_key: int) -> int | None:
        """See `Index.get_request_key`."""
        return self._inner.get_request_key(engine_key)

    def event_applier(self, token_processor: TokenProcessor) -> EventApplier:
        """See `Index.event_applier`."""
        return _InstrumentedApplier(self._inner.event_applier(token_processor), self._metrics)

    def _count_lookup(self, num_hits: int, max_pod_hits: int) -> None:
        self._metrics.lookup_requests.inc()
        self._metrics.lookup_hits.inc(num_hits)
        self._metrics.max_pod_hit_count.inc(max_pod_hits)


class _InstrumentedApplier:
    def __init__(self, inner: EventApplier, metrics: IndexMetrics) -> None:
        self._inner = inner
        self._metrics = metrics

    def apply(self, pod: str, model: str, payload: bytes) -> ApplyResult:
        result = self._inner.apply(pod, model, payload)
        self._metrics.admissions.inc(result.num_stored)
        self._metrics.evictions.inc(result.num_removed)
        return result
