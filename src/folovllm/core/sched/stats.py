"""Counters of the scheduler since the start of the core."""

from dataclasses import dataclass

from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.engine.messages import SchedulerStats
from folovllm.request import Request


@dataclass(slots=True)
class SchedulerCounters:
    """All but the last in tokens."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: int = 0
    num_preemptions: int = 0

    def count_prefix_hits(self, request: Request, *, has_prefix_cache: bool, has_connector: bool) -> None:
        """Count a request's hits, once: when it is first scheduled and its loads are judged, not at each lookup.

        A request that finds no room is looked up in every step.
        """
        num_external = request.num_external_cached_tokens
        num_local = (request.num_cached_tokens or 0) - num_external
        if has_prefix_cache:
            self.prefix_queries += request.num_prompt_tokens
            self.prefix_hits += num_local
        if has_connector:
            self.external_queries += request.num_prompt_tokens - num_local
            self.external_hits += num_external

    def snapshot(self, num_running: int, num_waiting: int, manager: KVCacheManager) -> SchedulerStats:
        """The counters, together with the sizes of now."""
        return SchedulerStats(
            num_running_reqs=num_running,
            num_waiting_reqs=num_waiting,
            kv_cache_usage=manager.usage,
            prefix_cache_queries=self.prefix_queries,
            prefix_cache_hits=self.prefix_hits,
            external_prefix_cache_queries=self.external_queries,
            external_prefix_cache_hits=self.external_hits,
            num_preemptions=self.num_preemptions,
            num_cached_blocks=manager.block_pool.num_cached_blocks,
        )
