from prometheus_client.parser import text_string_to_metric_families

from folovllm.engine.messages import SchedulerStats
from folovllm.metrics.stats import CacheStats, EngineMetrics

NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
}


def samples(metrics: EngineMetrics) -> dict[str, float]:
    """Sample name, with the finished_reason where there is one -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "demo"
            assert sample.labels["engine"] == "0"
            reason = sample.labels.get("finished_reason")
            found[f"{sample.name}/{reason}" if reason else sample.name] = sample.value
    return found


def test_series_have_the_names_of_vllm() -> None:
    assert {name.partition("/")[0] for name in samples(EngineMetrics("demo"))} >= NAMES


def test_counters_grow_by_what_the_core_counted() -> None:
    metrics = EngineMetrics("demo")
    metrics.observe_scheduler(SchedulerStats(prefix_cache_queries=10, prefix_cache_hits=4, num_running_reqs=3))
    metrics.observe_scheduler(SchedulerStats(prefix_cache_queries=15, prefix_cache_hits=4, num_running_reqs=1))
    found = samples(metrics)
    assert found["vllm:prefix_cache_queries_total"] == 15
    assert found["vllm:prefix_cache_hits_total"] == 4
    assert found["vllm:num_requests_running"] == 1


def test_dead_core_runs_nothing() -> None:
    metrics = EngineMetrics("demo")
    metrics.observe_scheduler(SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.5))
    metrics.observe_core_death()
    found = samples(metrics)
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0


def test_times_of_requests_are_observed() -> None:
    metrics = EngineMetrics("demo")
    metrics.observe_tokens(1, None)
    metrics.observe_first_token(12, 0.25)
    metrics.observe_tokens(2, 0.5)
    metrics.observe_finish("length", 0.75)
    metrics.observe_finish("abort", None)
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total"] == 12
    assert found["vllm:generation_tokens_total"] == 3
    assert found["vllm:time_to_first_token_seconds_sum"] == 0.25
    assert found["vllm:inter_token_latency_seconds_sum"] == 0.25
    assert found["vllm:e2e_request_latency_seconds_count"] == 1
    assert (found["vllm:request_success_total/length"], found["vllm:request_success_total/abort"]) == (1, 1)


def test_hit_rate_without_queries_is_zero() -> None:
    stats = CacheStats.from_scheduler(SchedulerStats())
    assert (stats.hit_rate, stats.external_hit_rate) == (0.0, 0.0)
    stats = CacheStats.from_scheduler(SchedulerStats(prefix_cache_queries=8, prefix_cache_hits=2))
    assert stats.hit_rate == 0.25
