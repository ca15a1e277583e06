"""The block index of kvrouter: scoring, event ingestion, memory and clearing, on one core.

    python benchmarks/bench_kvrouter_index.py [--json FILE]

Workload: 1,000,000 records, that is 124 prompts of 1,008 blocks held by 8 pods each, entered prompt by prompt; prompts
of 512 and 4,096 blocks are scored against it, warm, each different from the one before. Times are the best of several
rounds, per call or per block, in CPU time of the one thread that works, so that a busy machine disturbs them less.
Everything is called through Python, as the router does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench_environment import environment
from kvblocks.events import BlockStored, KVEventBatch, encode_batch
from kvrouter.kvblock.base import PodEntry
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.token_processor import TokenProcessor

NUM_PODS = 8
NUM_RECORDS = 1_000_000
BLOCK_SIZE = 16
ROUNDS = 7
PODS = [PodEntry(f"http://10.0.0.{i}:8000") for i in range(NUM_PODS)]


def best_of(run: Callable[[], object], calls: int, rounds: int = ROUNDS) -> float:
    """Return the seconds of one of the `calls` that `run` makes, in the fastest round."""
    fastest = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        run()
        fastest = min(fastest, time.thread_time() - start)
    return fastest / calls


def random_chains(num_chains: int, length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**63, length).astype(np.uint64) for _ in range(num_chains)]


def bench_score() -> dict[str, float]:
    results: dict[str, float] = {}
    for length in (512, 4096):
        chains = random_chains(NUM_RECORDS // NUM_PODS // length, length)
        index = InMemoryIndex()
        for chain in chains:
            index.add(None, chain, PODS)

        def score_all(index: InMemoryIndex = index, chains: list[np.ndarray] = chains) -> None:
            for chain in chains:
                index.score(chain)

        assert index.score(chains[0]) == {pod.pod: float(length) for pod in PODS}
        results[f"score_{length}_blocks_8_pods_us"] = best_of(score_all, len(chains)) * 1e6
        stats = index.stats()
        results["memory_per_record_8_pods_bytes"] = stats.memory_bytes / stats.num_records

    # Blocks of all prompts interleaved: no two neighbours of a prompt lie side by side.
    chains = random_chains(NUM_RECORDS // NUM_PODS // 4096, 4096)
    index = InMemoryIndex()
    index.add(None, np.stack(chains, axis=1).reshape(-1).copy(), PODS)
    results["score_4096_blocks_8_pods_scattered_us"] = (
        best_of(lambda: [index.score(chain) for chain in chains], len(chains)) * 1e6
    )

    index = InMemoryIndex(pod_cache_size=128)
    chain = random_chains(1, 4096)[0]
    for i in range(128):
        index.add(None, chain[: 32 * (i + 1)].copy(), [PodEntry(f"pod-{i}")])
    results["score_4096_blocks_128_pods_leaving_us"] = best_of(lambda: index.score(chain), 1, 200) * 1e6
    return results


def bench_prompt() -> dict[str, float]:
    index, processor = InMemoryIndex(), TokenProcessor(BLOCK_SIZE)
    tokens = np.random.default_rng(1).integers(0, 150_000, 8192).astype(np.uint32)
    index.add(None, processor.keys(tokens, "m"), PODS)
    for chain in random_chains(200, 512):
        index.add(None, chain, PODS)

    def run() -> None:
        for _ in range(100):
            index.score(processor.keys(tokens, "m"))

    return {"tokens_8192_to_scores_us": best_of(run, 100) * 1e6}


def stored_batches(num_blocks: int, blocks_per_event: int, events_per_batch: int) -> list[bytes]:
    rng = np.random.default_rng(2)
    events, batches, parent = [], [], None
    for first in range(0, num_blocks, blocks_per_event):
        hashes = rng.integers(0, 2**63, blocks_per_event).tolist()
        tokens = rng.integers(0, 150_000, blocks_per_event * BLOCK_SIZE).tolist()
        parent = None if first % 1024 == 0 else parent
        events.append(BlockStored(hashes, parent, tokens, BLOCK_SIZE, medium="GPU"))
        parent = hashes[-1]
        if len(events) == events_per_batch:
            batches.append(encode_batch(KVEventBatch(1.0, events, 0)))
            events = []
    return batches


def bench_ingest() -> dict[str, float]:
    results: dict[str, float] = {}
    for algorithm in ("sha256_cbor", "xxhash_cbor"):
        for blocks_per_event, events_per_batch in ((64, 1), (1, 1), (1, 16)):
            num_blocks = 65_536 if blocks_per_event == 64 else 32_768
            batches = stored_batches(num_blocks, blocks_per_event, events_per_batch)
            fastest = float("inf")
            for _ in range(ROUNDS):
                index = InMemoryIndex()
                applier = index.event_applier(TokenProcessor(BLOCK_SIZE, algorithm=algorithm))
                start = time.thread_time()
                for payload in batches:
                    applier.apply("pod", "m", payload)
                fastest = min(fastest, time.thread_time() - start)
                assert index.stats().num_blocks == num_blocks
            name = f"ingest_{algorithm}_{blocks_per_event}_block_events_{events_per_batch}_per_batch"
            results[f"{name}_blocks_per_s"] = num_blocks / fastest
        if algorithm == "sha256_cbor":
            stats = index.stats()
            results["memory_per_record_1_pod_with_digests_bytes"] = stats.memory_bytes / stats.num_records
    return results


def bench_clear() -> dict[str, float]:
    index = InMemoryIndex()
    rng = np.random.default_rng(3)
    for i in range(20):
        index.add(None, rng.integers(0, 2**63, 500_000).astype(np.uint64), [PodEntry(f"other-{i}")])
    index.add(None, rng.integers(0, 2**63, 100_000).astype(np.uint64), [PodEntry("pod")])
    start = time.thread_time()
    assert index.clear("pod") == 100_000
    return {"clear_100000_of_10m_ms": (time.thread_time() - start) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    for bench in (bench_score, bench_prompt, bench_ingest, bench_clear):
        results |= bench()
    rounded = {name: round(value, 3) for name, value in results.items()}
    head = {"benchmark": "kvrouter_index", "environment": environment("kvstrata", "numpy")}
    document = json.dumps(head | {"results": rounded}, indent=2)
    sys.stdout.write(document + "\n")
    if arguments.json:
        arguments.json.write_text(document + "\n")


if __name__ == "__main__":
    main()
