"""vLLM's KV connector interface, as vLLM and folovllm call it."""
