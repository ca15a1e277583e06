"""Scoring one long prompt over a fleet: token ids in, {pod: score} out, hashing included.

    python benchmarks/bench_kvrouter_indexer.py

Eight pods hold the prompt's blocks to eight depths, among other prompts' blocks; the parts (block keys, lookup and
score) are measured beside the whole in alternating runs. The result is JSON on stdout.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from bench_environment import environment
from kvblocks import _native
from kvrouter.indexer import Indexer
from kvrouter.kvblock.base import PodEntry

NUM_TOKENS = 8_192
NUM_PODS = 8
NUM_OTHER_BLOCKS = 125_000
"""Blocks of other prompts on each pod: a million records in all."""
VOCAB_SIZE = 151_936  # Qwen3's
MODEL = "Qwen/Qwen3-0.6B"
NUM_RUNS = 2_000
NUM_WARM_UP_RUNS = 100
TARGET_US = 200.0


def fill(indexer: Indexer, keys: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Fill the index and return the scores that the prompt must get."""
    expected = {}
    for number in range(NUM_PODS):
        depth = len(keys) * (number + 1) // NUM_PODS
        tier, weight = ("cpu", 0.8) if number % 2 else ("gpu", 1.0)
        entries = [PodEntry(f"pod-{number}", tier)]
        indexer.index.add(None, keys[:depth], entries)
        indexer.index.add(None, rng.integers(1, 2**63, NUM_OTHER_BLOCKS).astype(np.uint64), entries)
        expected[f"pod-{number}"] = depth * weight
    return expected


def timed_us(work: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e3


def summary(microseconds: list[float]) -> dict[str, float]:
    ordered = sorted(microseconds)
    return {
        "p50_us": round(statistics.median(ordered), 1),
        "p99_us": round(ordered[int(0.99 * len(ordered))], 1),
        "min_us": round(ordered[0], 1),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB_SIZE, NUM_TOKENS).astype(np.uint32)
    token_list = tokens.tolist()
    with Indexer() as indexer:
        keys = indexer.block_keys(tokens, MODEL)
        expected = fill(indexer, keys, rng)
        scores = indexer.get_pod_scores(tokens, MODEL)
        assert all(abs(scores.pop(pod) - score) < 1e-6 for pod, score in expected.items())
        assert not scores, "a pod scores that holds nothing"
        work: dict[str, Callable[[], object]] = {
            "get_pod_scores, uint32 array": lambda: indexer.get_pod_scores(tokens, MODEL),
            "get_pod_scores, list": lambda: indexer.get_pod_scores(token_list, MODEL),
            "block keys alone": lambda: indexer.block_keys(tokens, MODEL),
            "lookup and score alone": lambda: indexer.score_keys(keys),
        }
        measured: dict[str, list[float]] = {name: [] for name in work}
        for run in range(NUM_WARM_UP_RUNS + NUM_RUNS):
            for name, job in work.items():
                elapsed = timed_us(job)
                if run >= NUM_WARM_UP_RUNS:
                    measured[name].append(elapsed)
    result = {
        "benchmark": "kvrouter_indexer",
        "environment": environment("kvstrata", "numpy") | {"sha_extensions": _native.sha256_ni_supported()},
        "workload": {
            "num_tokens": NUM_TOKENS,
            "block_size": indexer.block_size,
            "num_pods": NUM_PODS,
            "num_records": NUM_PODS * NUM_OTHER_BLOCKS + len(keys) * (NUM_PODS + 1) // 2,
            "runs": NUM_RUNS,
        },
        "target_us": TARGET_US,
        "results": {name: summary(values) for name, values in measured.items()},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
