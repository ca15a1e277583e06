"""The control plane of flexkv: what a lookup, a put with eviction and a stored block cost.

    python benchmarks/bench_flexkv_index.py

The index holds conversations of turns; every turn adds a node of `BLOCKS_PER_TURN` blocks. Lookups go round many stored
prompts, so that the processor's caches do not hold the one that is asked for. The result is JSON on stdout.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench_environment import environment
from flexkv.cache.cache_engine import CacheEngine
from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.radixtree import RadixTree
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, EvictionConfig
from kvblocks.hashing import BlockHasher

STORED_BLOCKS = (100_000, 1_000_000)
TOKENS_PER_BLOCK = 16
BLOCKS_PER_TURN = 16
PROMPT_BLOCKS = 512
NUM_PROMPTS = 128
MATCH_BLOCKS = (512, 4096)
CHURN_RUNS = (1, 16, 64)
CHURN_BLOCKS = 400_000
NUM_RUNS = 1_000
VOCAB_SIZE = 151_936  # Qwen3's
PAGE_BYTES = 4096

HASHER = BlockHasher(block_size=TOKENS_PER_BLOCK)
RNG = np.random.default_rng(0)


def random_digests(num_blocks: int) -> npt.NDArray[np.uint8]:
    return RNG.integers(0, 256, (num_blocks, 32), dtype=np.uint8)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def summary(work: Callable[[], object], num_runs: int = NUM_RUNS) -> dict[str, float]:
    for _ in range(num_runs // 10):
        work()
    times = []
    for _ in range(num_runs):
        start = time.perf_counter_ns()
        work()
        times.append((time.perf_counter_ns() - start) / 1e3)
    times.sort()
    return {
        "p50_us": round(statistics.median(times), 1),
        "p99_us": round(times[int(0.99 * num_runs)], 1),
        "min_us": round(times[0], 1),
    }


def store(tier: CacheEngine, sequence: npt.NDArray[np.uint8], blocks_per_node: int) -> None:
    """Store a sequence turn by turn."""
    for end in range(blocks_per_node, len(sequence) + 1, blocks_per_node):
        prefix = tier.lock_prefix(sequence[:end], ready_only=False)
        inserted = tier.insert(prefix.handle, sequence[prefix.num_blocks : end])
        assert inserted is not None
        tier.set_ready(inserted.handle, len(inserted.block_ids))
        tier.unlock(inserted.handle)


def fill(tier: CacheEngine, blocks_per_node: int, turns: int = 8) -> None:
    """Fill a tier with conversations of `turns` turns."""
    while tier.num_free >= turns * blocks_per_node:
        store(tier, random_digests(turns * blocks_per_node), blocks_per_node)


def put(engine: GlobalCacheEngine, meta: SequenceMeta) -> None:
    """Store a sequence turn by turn through plans, as the copies would."""
    for end in range(BLOCKS_PER_TURN, meta.num_blocks + 1, BLOCKS_PER_TURN):
        tokens, digests = meta.token_ids[: end * TOKENS_PER_BLOCK], meta.block_hashes[:end]
        plan = engine.plan_put(SequenceMeta(tokens, digests, TOKENS_PER_BLOCK))
        for op_id in plan.caller_op_ids:
            engine.op_finished(plan, op_id, ok=True)
        engine.release(plan)
        engine.take_events()


def bench_lookup(num_stored: int) -> dict[str, object]:
    """A prompt of 8,192 tokens: plan the load of all of it, and give it back."""
    config = CacheConfig(cpu=CpuTierConfig(num_blocks=num_stored), tokens_per_block=TOKENS_PER_BLOCK)
    engine = GlobalCacheEngine(config, num_stored)
    num_tokens = PROMPT_BLOCKS * TOKENS_PER_BLOCK
    prompts = [RNG.integers(0, VOCAB_SIZE, num_tokens, dtype=np.int64) for _ in range(NUM_PROMPTS)]
    metas = [SequenceMeta.from_tokens(tokens, TOKENS_PER_BLOCK, HASHER) for tokens in prompts]
    while engine.stats().num_free_blocks >= (NUM_PROMPTS + 1) * PROMPT_BLOCKS:
        put(engine, SequenceMeta(prompts[0], random_digests(PROMPT_BLOCKS), TOKENS_PER_BLOCK))
    for meta in metas:
        put(engine, meta)
    next_prompt, next_meta = itertools.cycle(prompts), itertools.cycle(metas)

    def lookup(meta: SequenceMeta) -> None:
        plan = engine.plan_get(meta)
        assert plan.num_blocks == PROMPT_BLOCKS
        engine.release(plan)

    return {
        "stored_blocks": engine.num_cached_blocks,
        "hash_and_lookup": summary(
            lambda: lookup(SequenceMeta.from_tokens(next(next_prompt), TOKENS_PER_BLOCK, HASHER))
        ),
        "hash": summary(lambda: SequenceMeta.from_tokens(next(next_prompt), TOKENS_PER_BLOCK, HASHER)),
        "lookup": summary(lambda: lookup(next(next_meta))),
        "same_prompt_lookup": summary(lambda: lookup(metas[0])),
    }


def bench_match(num_blocks: int, blocks_per_node: int) -> dict[str, object]:
    """The match alone, over 16 stored sequences in turn."""
    tree = RadixTree(32)
    sequences = [random_digests(num_blocks) for _ in range(16)]
    ids = itertools.count(0, blocks_per_node)
    for sequence in sequences:
        handle = tree.lock_prefix(sequence, ready_only=False).handle
        for start in range(0, num_blocks, blocks_per_node):
            first = next(ids)
            node_ids = np.arange(first, first + blocks_per_node)
            handle = tree.insert(handle, sequence[start : start + blocks_per_node], node_ids)
        tree.set_ready(handle, num_blocks)
        tree.unlock(handle)
    assert tree.match(sequences[0]) == (num_blocks, num_blocks)
    turn = itertools.cycle(sequences)
    return {
        "blocks": num_blocks,
        "blocks_per_node": blocks_per_node,
        "going_round": summary(lambda: tree.match(next(turn))),
        "same_sequence": summary(lambda: tree.match(sequences[0])),
    }


def bench_churn(blocks_per_put: int) -> dict[str, object]:
    """Insert into a full tier, which evicts as many blocks each time."""
    tier = CacheEngine(STORED_BLOCKS[-1], 32, EvictionConfig(evict_ratio=0.0))
    fill(tier, BLOCKS_PER_TURN)
    digests = random_digests(CHURN_BLOCKS)
    start = time.perf_counter()
    for first in range(0, CHURN_BLOCKS, blocks_per_put):
        store(tier, digests[first : first + blocks_per_put], blocks_per_put)
    seconds = time.perf_counter() - start
    return {"blocks_per_put": blocks_per_put, "blocks_per_s": round(CHURN_BLOCKS / seconds)}


def bench_memory(blocks_per_node: int) -> dict[str, object]:
    """Memory of the index at 1,000,000 blocks, as it counts it and as the system sees it."""
    before = resident_bytes()
    tier = CacheEngine(STORED_BLOCKS[-1], 32, EvictionConfig())
    fill(tier, blocks_per_node)
    held = tier.counts().num_blocks
    return {
        "blocks_per_node": blocks_per_node,
        "counted_bytes_per_block": round(tier.memory_bytes() / held, 1),
        "resident_bytes_per_block": round((resident_bytes() - before) / held, 1),
    }


def in_fresh_process(bench: Callable[[int], dict[str, object]], arguments: tuple[int, ...]) -> list[dict[str, object]]:
    """Run each case in a process of its own: memory that another case gave back would hide what it takes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(bench, arguments))


def main() -> None:
    result = {
        "benchmark": "flexkv_index",
        "environment": environment("kvstrata", "numpy"),
        "memory_at_1m_blocks": in_fresh_process(bench_memory, (64, 16, 1)),
        "get_match_8192_tokens": [bench_lookup(num_stored) for num_stored in STORED_BLOCKS],
        "match": [bench_match(num_blocks, per_node) for num_blocks in MATCH_BLOCKS for per_node in (num_blocks, 32)],
        "insert_and_evict_at_1m_blocks": [bench_churn(blocks) for blocks in CHURN_RUNS],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
