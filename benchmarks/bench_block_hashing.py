"""Block hashing of one long prompt: ours against vLLM's Python path, in alternating runs on the same machine.

    python benchmarks/bench_block_hashing.py [--vllm-python .venv-vllm/bin/python]

The peer is vLLM's own `hash_block_tokens` over `sha256_cbor`, block after block, in an interpreter that has vLLM; its
last digest must equal ours. Without such an interpreter only ours is measured. The result is JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench_environment import environment
from kvblocks import _native
from kvblocks.hashing import BlockHasher

NUM_TOKENS = 1_000_000
VOCAB_SIZE = 151_936  # Qwen3's
BLOCK_SIZE = 16
SEED = "0"
NUM_RUNS = 9

# Runs in vLLM's interpreter: one measurement per line on stdin, its seconds and last digest as JSON on stdout.
PEER = f"""
import json, random, sys, time
import vllm
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils

kv_cache_utils.init_none_hash(sha256_cbor)
random_ids = random.Random(0)
tokens = [random_ids.randrange({VOCAB_SIZE}) for _ in range({NUM_TOKENS})]
print(json.dumps({{"version": vllm.__version__}}), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    digests, parent = [], None
    for first in range(0, len(tokens) - {BLOCK_SIZE} + 1, {BLOCK_SIZE}):
        parent = kv_cache_utils.hash_block_tokens(sha256_cbor, parent, tokens[first : first + {BLOCK_SIZE}])
        digests.append(parent)
    print(json.dumps({{"seconds": time.perf_counter() - start, "last": digests[-1].hex()}}), flush=True)
"""


class Peer:
    """vLLM in a process of its own, measured on request."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [python, "-c", PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": SEED, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        self.version = self._read()["version"]

    def run(self) -> tuple[float, str]:
        """Return the seconds of one measurement, and the last digest."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["last"]

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit("the interpreter with vLLM ended early; try `import vllm` in it")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(seconds: list[float]) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "median_ms": round(median * 1e3, 3),
        "min_ms": round(min(seconds) * 1e3, 3),
        "max_ms": round(max(seconds) * 1e3, 3),
        "mtok_per_s": round(NUM_TOKENS / median / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_python = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    parser.add_argument("--vllm-python", type=Path, default=default_python, help="an interpreter that has vLLM")
    python: Path = parser.parse_args().vllm_python

    random_ids = random.Random(0)
    token_list = [random_ids.randrange(VOCAB_SIZE) for _ in range(NUM_TOKENS)]
    token_array = np.array(token_list, np.uint32)
    sha256 = BlockHasher("sha256_cbor", SEED, BLOCK_SIZE)
    xxh3 = BlockHasher("xxhash_cbor", SEED, BLOCK_SIZE)
    ours: dict[str, Callable[[], object]] = {
        "sha256_cbor list -> list[bytes]": lambda: sha256.hash_blocks(token_list),
        "sha256_cbor list -> packed": lambda: sha256.hash_blocks_packed(token_list),
        "sha256_cbor uint32 array -> packed": lambda: sha256.hash_blocks_packed(token_array),
        "xxhash_cbor uint32 array -> packed": lambda: xxh3.hash_blocks_packed(token_array),
    }
    peer = Peer(python) if python.exists() else None
    if peer is None:
        print(f"no interpreter with vLLM at {python}: measuring ours alone", file=sys.stderr)

    seconds: dict[str, list[float]] = {name: [] for name in ours}
    peer_seconds: list[float] = []
    for _ in range(NUM_RUNS):
        for name, work in ours.items():
            seconds[name].append(timed(work))
        if peer is not None:
            elapsed, last = peer.run()
            peer_seconds.append(elapsed)
            assert last == sha256.hash_blocks(token_list)[-1].hex(), "vLLM and kvblocks disagree"

    result: dict[str, Any] = {
        "benchmark": "block_hashing",
        "environment": environment("kvstrata", "numpy") | {"sha_extensions": _native.sha256_ni_supported()},
        "workload": {"num_tokens": NUM_TOKENS, "vocab_size": VOCAB_SIZE, "block_size": BLOCK_SIZE, "runs": NUM_RUNS},
        "kvblocks": {name: summary(values) for name, values in seconds.items()},
    }
    if peer is not None:
        peer.close()
        result["environment"]["versions"]["vllm"] = peer.version
        result["vllm sha256_cbor list -> list[bytes]"] = summary(peer_seconds)
        result["ratio"] = {
            name: round(statistics.median(peer_seconds) / statistics.median(values), 1)
            for name, values in seconds.items()
            if name.startswith("sha256_cbor")
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
