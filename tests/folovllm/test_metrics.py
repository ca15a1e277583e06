from prometheus_client.parser import text_string_to_metric_families

from folovllm.engine.messages import SchedulerStats
from folovllm.metrics.stats import CacheStats, EngineMetrics, RequestFacts
from folovllm.outputs import RequestMetrics

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
    "vllm:prompt_tokens_cached_total",
    "vllm:prompt_tokens_by_source_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_time_per_output_token_seconds_sum",
    "vllm:request_prompt_tokens_sum",
    "vllm:request_generation_tokens_sum",
    "vllm:request_params_max_tokens_sum",
    "vllm:request_prefill_kv_computed_tokens_sum",
    "vllm:request_num_preemptions_sum",
    "vllm:iteration_tokens_total_bucket",
}


def samples(metrics: EngineMetrics) -> dict[str, float]:
    """Sample name, with the finished_reason or source where there is one -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "demo"
            assert sample.labels["engine"] == "0"
            reason = sample.labels.get("finished_reason") or sample.labels.get("source")
            found[f"{sample.name}/{reason}" if reason else sample.name] = sample.value
    return found


def test_series_have_the_names_of_vllm() -> None:
    assert {name.partition("/")[0] for name in samples(EngineMetrics("demo"))} >= NAMES


def test_counters_grow_by_what_the_core_counted() -> None:
    metrics = EngineMetrics("demo")
    metrics.observe_step(SchedulerStats(prefix_cache_queries=10, prefix_cache_hits=4, num_running_reqs=3), 7)
    metrics.observe_step(SchedulerStats(prefix_cache_queries=15, prefix_cache_hits=4, num_running_reqs=1), 0)
    found = samples(metrics)
    assert found["vllm:prefix_cache_queries_total"] == 15
    assert found["vllm:prefix_cache_hits_total"] == 4
    assert found["vllm:num_requests_running"] == 1
    assert found["vllm:iteration_tokens_total_sum"] == 7
    assert found["vllm:iteration_tokens_total_count"] == 1


def test_dead_core_runs_nothing() -> None:
    metrics = EngineMetrics("demo")
    metrics.observe_step(SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.5), 0)
    metrics.observe_core_death()
    found = samples(metrics)
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0


def test_times_of_requests_are_observed() -> None:
    metrics = EngineMetrics("demo")
    facts = RequestFacts(
        num_prompt_tokens=12,
        num_cached_tokens=8,
        num_external_cached_tokens=3,
        num_generation_tokens=3,
        max_tokens=9,
        num_preemptions=1,
    )
    metrics.observe_tokens(1, None)
    metrics.observe_first_token(facts, 0.25)
    metrics.observe_tokens(2, 0.5)
    times = RequestMetrics(arrival_time=10.0, scheduled_time=10.125, first_token_time=10.25, last_token_time=10.75)
    metrics.observe_finish("length", facts, times, 10.75)
    metrics.observe_finish("abort")
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total"] == 12
    assert found["vllm:prompt_tokens_cached_total"] == 8
    assert found["vllm:generation_tokens_total"] == 3
    sums = {
        "time_to_first_token_seconds": 0.25,
        "inter_token_latency_seconds": 0.25,
        "e2e_request_latency_seconds": 0.75,
        "request_queue_time_seconds": 0.125,
        "request_prefill_time_seconds": 0.125,
        "request_decode_time_seconds": 0.5,
        "request_inference_time_seconds": 0.625,
        "request_time_per_output_token_seconds": 0.25,
        "request_prompt_tokens": 12,
        "request_generation_tokens": 3,
        "request_params_max_tokens": 9,
        "request_prefill_kv_computed_tokens": 4,
        "request_num_preemptions": 1,
    }
    assert {name: found[f"vllm:{name}_sum"] for name in sums} == sums
    assert all(found[f"vllm:{name}_count"] == 1 for name in sums)
    assert (found["vllm:request_success_total/length"], found["vllm:request_success_total/abort"]) == (1, 1)
    sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
    assert [found[f"vllm:prompt_tokens_by_source_total/{source}"] for source in sources] == [4, 5, 3]


def test_request_that_never_ran_has_no_phases() -> None:
    metrics = EngineMetrics("demo")
    metrics.observe_finish("error", RequestFacts(num_prompt_tokens=5), RequestMetrics(arrival_time=1.0), 3.0)
    found = samples(metrics)
    assert found["vllm:e2e_request_latency_seconds_sum"] == 2
    assert found["vllm:request_queue_time_seconds_count"] == found["vllm:request_decode_time_seconds_count"] == 0


def test_facts_of_the_cache_are_labels() -> None:
    metrics = EngineMetrics("demo")
    metrics.set_cache_config(block_size=16, num_gpu_blocks=100, enable_prefix_caching=True)
    line = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="100"} 1.0'
    assert line in metrics.render().decode().splitlines()


def test_hit_rate_without_queries_is_zero() -> None:
    stats = CacheStats.from_scheduler(SchedulerStats())
    assert (stats.hit_rate, stats.external_hit_rate) == (0.0, 0.0)
    stats = CacheStats.from_scheduler(SchedulerStats(prefix_cache_queries=8, prefix_cache_hits=2))
    assert stats.hit_rate == 0.25
