"""A compact LLM inference engine, aligned module by module with vLLM v1.

Read in this order: `request`, `core.block_pool`, `core.kv_cache_manager`, `core.sched.scheduler`,
`worker.model_runner`, `engine.core`, `engine.arg_utils`, `entrypoints.llm`.
"""
