"""What the engine counts, under vLLM's metric names."""
