"""What runs in the next step. Mirrors vllm/v1/core/sched."""
