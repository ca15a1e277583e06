"""Metrics of the engine: Prometheus series under vLLM's names, and the cache figures `LLM` reports.

Source: vllm/v1/metrics/loggers.py, so that dashboards and routers made for vLLM read this engine too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from folovllm.engine.messages import FinishReason, SchedulerStats
from folovllm.outputs import RequestMetrics

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
_STEP_BUCKETS = tuple(2.0**i for i in (0, *range(3, 15)))
_TOKENS_BUCKETS = tuple(float(digit * 10**i) for i in range(6) for digit in (1, 2, 5))
_PREEMPTIONS_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_LABELS = ("model_name", "engine")
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")

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
# Of each request that ended with an answer: field -> name, help, buckets.
_REQUEST_HISTOGRAMS = {
    "prompt": ("vllm:request_prompt_tokens", "Prompt tokens.", _TOKENS_BUCKETS),
    "generation": ("vllm:request_generation_tokens", "Generated tokens.", _TOKENS_BUCKETS),
    "max_tokens": ("vllm:request_params_max_tokens", "Tokens it was allowed to generate.", _TOKENS_BUCKETS),
    "computed": ("vllm:request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.", _TOKENS_BUCKETS),
    "preemptions": ("vllm:request_num_preemptions", "How often it lost its blocks.", _PREEMPTIONS_BUCKETS),
    "e2e": ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY_BUCKETS),
    "queue": ("vllm:request_queue_time_seconds", "From arrival to the first step.", _LATENCY_BUCKETS),
    "prefill": ("vllm:request_prefill_time_seconds", "From the first step to the first token.", _LATENCY_BUCKETS),
    "decode": ("vllm:request_decode_time_seconds", "From the first token to the last.", _LATENCY_BUCKETS),
    "inference": ("vllm:request_inference_time_seconds", "From the first step to the last token.", _LATENCY_BUCKETS),
    "tpot": ("vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _ITL_BUCKETS),
}


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What is known of a request, in tokens."""

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Of the prompt; those of the connector included."""
    num_external_cached_tokens: int = 0
    num_generation_tokens: int = 0
    max_tokens: int | None = None
    num_preemptions: int = 0


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
        self._labels = {"model_name": model_name, "engine": "0"}
        self._gauges = {
            field: Gauge(name, text, _LABELS, registry=self.registry).labels(**self._labels)
            for field, (name, text) in _GAUGES.items()
        }
        self._counters = {field: self._counter(name, text) for field, (name, text) in _COUNTERS.items()}
        self._seen = SchedulerStats()
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Of these, tokens that were not computed.")
        self._by_source = self._labelled(
            "vllm:prompt_tokens_by_source",
            "The same, by where their keys and values came from.",
            "source",
            ("local_compute", "local_cache_hit", "external_kv_transfer"),
        )
        self._generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._finished = self._labelled(
            "vllm:request_success", "Requests that ended, by reason.", "finished_reason", _REASONS
        )
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS
        )
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "From token to token.", _ITL_BUCKETS)
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of a step.", _STEP_BUCKETS)
        self._of_requests = {field: self._histogram(*series) for field, series in _REQUEST_HISTOGRAMS.items()}

    def set_cache_config(self, **facts: object) -> None:
        """Publish facts of the KV cache, as labels of a gauge that is 1."""
        names = (*facts, "engine")
        gauge = Gauge("vllm:cache_config_info", "Facts of the KV cache.", names, registry=self.registry)
        gauge.labels(**{name: str(value) for name, value in facts.items()}, engine=self._labels["engine"]).set(1)

    def observe_step(self, stats: SchedulerStats | None, num_tokens: int) -> None:
        """Take over the state after a step; `num_tokens` were generated, or belong to a prompt that was completed."""
        if num_tokens:
            self._step_tokens.observe(num_tokens)
        if stats is None:
            return
        for field, gauge in self._gauges.items():
            gauge.set(getattr(stats, field))
        for field, counter in self._counters.items():
            counter.inc(max(0, getattr(stats, field) - getattr(self._seen, field)))
        self._seen = stats

    def observe_first_token(self, request: RequestFacts, seconds: float) -> None:
        """A request began to answer `seconds` after it arrived."""
        cached, external = request.num_cached_tokens, request.num_external_cached_tokens
        self._prompt_tokens.inc(request.num_prompt_tokens)
        self._cached_tokens.inc(cached)
        self._by_source["local_compute"].inc(request.num_prompt_tokens - cached)
        self._by_source["local_cache_hit"].inc(cached - external)
        self._by_source["external_kv_transfer"].inc(external)
        self._ttft.observe(seconds)

    def observe_tokens(self, num_tokens: int, seconds_since_last: float | None) -> None:
        """A request gained tokens; None marks its first ones."""
        self._generation_tokens.inc(num_tokens)
        if seconds_since_last is not None:
            self._itl.observe(seconds_since_last / num_tokens)

    def observe_finish(
        self,
        reason: FinishReason,
        request: RequestFacts | None = None,
        times: RequestMetrics | None = None,
        now: float = 0.0,
    ) -> None:
        """A request ended, at `now` on the clock of `times`; without these it ended without a whole answer."""
        self._finished[reason].inc()
        if request is None or times is None:
            return
        spans = {"e2e": (times.arrival_time, now)}
        if times.scheduled_time is not None:
            spans["queue"] = (times.arrival_time, times.scheduled_time)
            spans["inference"] = (times.scheduled_time, now)
            if times.first_token_time is not None:
                spans["prefill"] = (times.scheduled_time, times.first_token_time)
        if times.first_token_time is not None:
            spans["decode"] = (times.first_token_time, now)
        values: dict[str, float] = {field: max(0.0, end - begin) for field, (begin, end) in spans.items()}
        values["prompt"], values["generation"] = request.num_prompt_tokens, request.num_generation_tokens
        values["computed"] = request.num_prompt_tokens - request.num_cached_tokens
        values["preemptions"] = request.num_preemptions
        if request.max_tokens is not None:
            values["max_tokens"] = request.max_tokens
        if "decode" in values and request.num_generation_tokens > 1:
            values["tpot"] = values["decode"] / (request.num_generation_tokens - 1)
        for field, value in values.items():
            self._of_requests[field].observe(value)

    def observe_core_death(self) -> None:
        """Nothing runs and nothing waits any more."""
        for gauge in self._gauges.values():
            gauge.set(0)

    def render(self) -> bytes:
        """The text format Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(**self._labels)

    def _labelled(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Counter]:
        counter = Counter(name, text, (*_LABELS, label), registry=self.registry)
        return {value: counter.labels(**self._labels, **{label: value}) for value in values}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry).labels(**self._labels)
