"""Prometheus metrics of the index and of the event path, under the names that llm-d's dashboards use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_LATENCY_BUCKETS: Final = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 1.0)


class IndexMetrics:
    """Counters and histograms that an instrumented index feeds; one per registry.

    Attributes:
        admissions: keys added.
        evictions: keys taken back.
        lookup_requests: lookups and scores.
        lookup_hits: keys found by them.
        max_pod_hit_count: keys found on the best pod, summed over lookups and scores.
        lookup_latency: seconds per lookup or score.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the metrics; ValueError if the registry has them already."""
        self.admissions: Final = Counter("kvcache_index_admissions", "Keys added to the index", registry=registry)
        self.evictions: Final = Counter("kvcache_index_evictions", "Keys taken out of the index", registry=registry)
        self.lookup_requests: Final = Counter("kvcache_index_lookup_requests", "Lookups", registry=registry)
        self.lookup_hits: Final = Counter("kvcache_index_lookup_hits", "Keys found by lookups", registry=registry)
        self.max_pod_hit_count: Final = Counter(
            "kvcache_index_max_pod_hit_count", "Keys found on the best pod, summed over lookups", registry=registry
        )
        self.lookup_latency: Final = Histogram(
            "kvcache_index_lookup_latency_seconds", "Time of one lookup", buckets=_LATENCY_BUCKETS, registry=registry
        )


class EventPathCollector(Collector):
    """Reads counts of the event path and the fill of the index when scraped, so that they cost nothing otherwise."""

    def __init__(
        self,
        registry: CollectorRegistry,
        event_counts: Callable[[], Mapping[str, int]],
        pod_states: Callable[[], Mapping[str, str]],
        index_gauges: Callable[[], Mapping[str, int]],
    ) -> None:
        """Register with `registry`.

        Args:
            registry: where to register.
            event_counts: counts by kind, such as `EventCounters.snapshot`.
            pod_states: state ("live", "recovering", "degraded") by pod.
            index_gauges: current values by name, such as `{"blocks": 10, "memory_bytes": 4096}`.
        """
        self._event_counts = event_counts
        self._pod_states = pod_states
        self._index_gauges = index_gauges
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        events = CounterMetricFamily("kvcache_events", "What came of the engines' events", labels=["kind"])
        for kind, count in sorted(self._event_counts().items()):
            events.add_metric([kind], count)
        yield events
        states = GaugeMetricFamily("kvcache_pod_state", "1 for the state of a pod's events", labels=["pod", "state"])
        for pod, state in sorted(self._pod_states().items()):
            states.add_metric([pod, state], 1)
        yield states
        for name, value in sorted(self._index_gauges().items()):
            yield GaugeMetricFamily(f"kvcache_index_{name}", f"Current {name} of the index", value=value)

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: names are only known when scraped."""
        return iter(())
