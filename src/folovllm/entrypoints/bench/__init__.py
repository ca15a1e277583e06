"""`folovllm bench`: `offline` (latency, throughput), `serve` (a load generator). Mirrors vllm/benchmarks."""
