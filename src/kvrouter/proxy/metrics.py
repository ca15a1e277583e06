"""The proxy's Prometheus metrics, in a registry of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvrouter.proxy.pods import Pod, PodState

_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TTFT_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ProxyMetrics:
    """Counters and histograms of one proxy; see each one's help text."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Register the metrics; None makes a new registry."""
        self.registry: Final = registry or CollectorRegistry()
        self._pods: _PodCollector | None = None
        self.requests = Counter(
            "kvrouter_proxy_requests",
            "Requests answered, by pod and status.",
            ["pod", "status"],
            registry=self.registry,
        )
        self.attempts = Counter(
            "kvrouter_proxy_attempts", "Requests sent to a pod, retries included.", ["pod"], registry=self.registry
        )
        self.retries = Counter(
            "kvrouter_proxy_retries",
            "Requests sent again after this pod did not take them, by reason.",
            ["pod", "reason"],
            registry=self.registry,
        )
        self.failovers = Counter(
            "kvrouter_proxy_failovers", "Requests answered by another pod than the first.", registry=self.registry
        )
        self.broken_streams = Counter(
            "kvrouter_proxy_broken_streams",
            "Answers a pod broke off after their first byte.",
            ["pod"],
            registry=self.registry,
        )
        self.overloads = Counter(
            "kvrouter_proxy_overloads",
            "Requests refused because as many as allowed were in hand.",
            registry=self.registry,
        )
        self.disconnects = Counter(
            "kvrouter_proxy_client_disconnects", "Requests whose client went away first.", registry=self.registry
        )
        self.unscored = Counter(
            "kvrouter_proxy_unscored_requests",
            "Requests routed by load alone although the policy reads scores, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "kvrouter_proxy_prompt_tokens", "Prompt tokens routed, by pod.", ["pod"], registry=self.registry
        )
        self.predicted_cached_tokens = Counter(
            "kvrouter_proxy_predicted_cached_tokens",
            "Prompt tokens that the chosen pod was predicted to have cached.",
            ["pod"],
            registry=self.registry,
        )
        self.routing_seconds = Histogram(
            "kvrouter_proxy_routing_latency_seconds",
            "From the parsed request to the choice of a pod, tokenisation included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_byte_seconds = Histogram(
            "kvrouter_proxy_first_byte_seconds",
            "From the request to the first byte of the pod's answer.",
            ["pod"],
            buckets=_TTFT_SECONDS,
            registry=self.registry,
        )

    def watch(self, pods: Iterable[Pod]) -> None:
        """Also report the state and the load of these pods."""
        self._pods = _PodCollector(list(pods))
        self.registry.register(self._pods)

    async def render(self) -> bytes:
        """The metrics in Prometheus' text format; called on the loop that owns the pods, formatted on a thread."""
        if self._pods is not None:
            self._pods.read()
        return await asyncio.to_thread(generate_latest, self.registry)


@dataclass(frozen=True, slots=True)
class _PodLoad:
    name: str
    is_up: bool
    queued_prefill_tokens: int
    num_prefills: int
    num_decodes: int


class _PodCollector(Collector):
    def __init__(self, pods: list[Pod]) -> None:
        self._pods = pods
        self._loads: tuple[_PodLoad, ...] = ()  # replaced as a whole, so that another thread may read it
        self.read()

    def read(self) -> None:
        """Note how the pods are now; on their owner's thread."""
        self._loads = tuple(
            _PodLoad(pod.name, pod.state is PodState.UP, pod.queued_prefill_tokens, pod.num_prefills, pod.num_decodes)
            for pod in self._pods
        )

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("kvrouter_pod_up", "1 if the pod takes requests.", labels=["pod"])
        queued = GaugeMetricFamily(
            "kvrouter_pod_queued_prefill_tokens", "Prompt tokens the pod has yet to compute.", labels=["pod"]
        )
        running = GaugeMetricFamily("kvrouter_pod_running_requests", "Requests by phase.", labels=["pod", "phase"])
        for pod in self._loads:
            up.add_metric([pod.name], float(pod.is_up))
            queued.add_metric([pod.name], pod.queued_prefill_tokens)
            running.add_metric([pod.name, "prefill"], pod.num_prefills)
            running.add_metric([pod.name, "decode"], pod.num_decodes)
        yield from (up, queued, running)
