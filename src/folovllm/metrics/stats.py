"""Metrics of the engine: Prometheus series under vLLM's names, and the cache figures `LLM` reports.

Source: vllm/v1/metrics/loggers.py, so that dashboards and routers made for vLLM read this engine too.
"""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from folovllm.engine.messages import FinishReason, SchedulerStats

# fmt: off
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
_ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
# fmt: on
_LABELS = ("model_name", "engine")

# Fields of SchedulerStats that only grow, and the counter each one feeds.
_COUNTERS = {
    "prefix_cache_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the device's prefix cache."),
    "prefix_cache_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the device's prefix cache."),
    "external_prefix_cache_queries": (
        "vllm:external_prefix_cache_queries",
        "Prompt tokens the KV connector was asked for.",
    ),
    "external_prefix_cache_hits": ("vllm:external_prefix_cache_hits", "Prompt tokens the KV connector had."),
    "num_preemptions": ("vllm:num_preemptions", "Requests that lost their blocks and were computed again."),
}
_GAUGES = {
    "num_running_reqs": ("vllm:num_requests_running", "Requests in the running batch."),
    "num_waiting_reqs": ("vllm:num_requests_waiting", "Requests that wait to be scheduled."),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "Share of the KV blocks in use; 1 means all of them."),
}


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The prefix cache since the engine started; queries and hits in prompt tokens."""

    queries: int
    hits: int
    external_queries: int
    external_hits: int
    cached_blocks: int
    """Device blocks that can be found by their hash."""
    kv_cache_usage: float
    """Share of the pool's blocks in use, 0 to 1."""
    num_preemptions: int

    @classmethod
    def from_scheduler(cls, stats: SchedulerStats) -> "CacheStats":
        """Read them from what the core reported last."""
        return cls(
            queries=stats.prefix_cache_queries,
            hits=stats.prefix_cache_hits,
            external_queries=stats.external_prefix_cache_queries,
            external_hits=stats.external_prefix_cache_hits,
            cached_blocks=stats.num_cached_blocks,
            kv_cache_usage=stats.kv_cache_usage,
            num_preemptions=stats.num_preemptions,
        )

    @property
    def hit_rate(self) -> float:
        """Share of the looked up prompt tokens that the device had, 0 to 1."""
        return self.hits / self.queries if self.queries else 0.0

    @property
    def external_hit_rate(self) -> float:
        """Share of the tokens asked of the KV connector that it had, 0 to 1."""
        return self.external_hits / self.external_queries if self.external_queries else 0.0


class EngineMetrics:
    """The Prometheus series of one engine, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels = self._labels = {"model_name": model_name, "engine": "0"}
        self._gauges = {
            field: Gauge(name, text, _LABELS, registry=self.registry).labels(**labels)
            for field, (name, text) in _GAUGES.items()
        }
        self._counters = {field: self._counter(name, text) for field, (name, text) in _COUNTERS.items()}
        self._seen = SchedulerStats()
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS
        )
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "From token to token.", _ITL_BUCKETS)
        self._e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY_BUCKETS
        )
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._finished = {
            reason: success.labels(**labels, finished_reason=reason) for reason in ("stop", "length", "abort", "error")
        }

    def observe_scheduler(self, stats: SchedulerStats) -> None:
        """Take over the state after a step."""
        for field, gauge in self._gauges.items():
            gauge.set(getattr(stats, field))
        for field, counter in self._counters.items():
            counter.inc(max(0, getattr(stats, field) - getattr(self._seen, field)))
        self._seen = stats

    def observe_first_token(self, num_prompt_tokens: int, seconds: float) -> None:
        """A request began to answer `seconds` after it arrived."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._ttft.observe(seconds)

    def observe_tokens(self, num_tokens: int, seconds_since_last: float | None) -> None:
        """A request gained tokens; None marks its first ones."""
        self._generation_tokens.inc(num_tokens)
        if seconds_since_last is not None:
            self._itl.observe(seconds_since_last / num_tokens)

    def observe_finish(self, reason: FinishReason, seconds: float | None) -> None:
        """A request ended; `seconds` after it arrived, None when it ended without an answer."""
        self._finished[reason].inc()
        if seconds is not None:
            self._e2e.observe(seconds)

    def observe_core_death(self) -> None:
        """Nothing runs and nothing waits any more."""
        for gauge in self._gauges.values():
            gauge.set(0)

    def render(self) -> bytes:
        """The text format Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry).labels(**self._labels)
