"""From requests to outputs: the core loop, its clients, and the tokenising ends. Mirrors vllm/v1/engine."""
