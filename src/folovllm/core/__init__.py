"""Scheduling and KV cache bookkeeping: no tensors, no model. Mirrors vllm/v1/core."""
