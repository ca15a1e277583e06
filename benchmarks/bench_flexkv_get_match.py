"""`KVManager.get_match` of an 8,192-token prompt, whole call and its parts, against 100,000 blocks really stored.

The blocks are put through the store's own path (device tensor -> CPU tier); only their size is small.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from bench_environment import environment
from flexkv.common.block import SequenceMeta
from flexkv.common.config import CacheConfig, CpuTierConfig, ModelConfig
from flexkv.common.request import ResponseStatus
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient
from kvblocks.hashing import BlockHasher

BLOCK = 16
PROMPT_TOKENS = 8_192
STORED_BLOCKS = 100_000
REPEATS = 300
MODEL = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float32", model_id="bench")


def fill(store: KVManager, rng: np.random.Generator) -> list[np.ndarray]:
    """Store prompts of `PROMPT_TOKENS` until the store holds `STORED_BLOCKS`; returns the prompts."""
    slots = np.arange(PROMPT_TOKENS)
    prompts = []
    for _ in range(STORED_BLOCKS // (PROMPT_TOKENS // BLOCK)):
        prompts.append(rng.integers(0, 150_000, PROMPT_TOKENS))
        task = store.put_async(prompts[-1], slots)
        response = store.wait([task], completely=True)[task]
        assert response.status is ResponseStatus.SUCCESS, response
    return prompts


def median_us(call: Callable[[int], object], undo: Callable[[], object] = lambda: None) -> float:
    samples = []
    for index in range(REPEATS):
        start = time.perf_counter()
        call(index)
        samples.append((time.perf_counter() - start) * 1e6)
        undo()
    return statistics.median(samples)


def main() -> None:
    rng = np.random.default_rng(0)
    cache = CacheConfig(CpuTierConfig(num_blocks=STORED_BLOCKS + 1024), BLOCK)
    kv = torch.zeros(PROMPT_TOKENS // BLOCK, 2, 1, BLOCK, 8)
    hasher = BlockHasher(block_size=BLOCK)
    with KVManager(MODEL, cache) as store, KVTPClient(store.device_dir, 0, MODEL, BLOCK) as client:
        client.register({"layer": kv})
        assert store.wait_ready(20)
        prompts = fill(store, rng)

        def match(index: int) -> None:
            task, mask = store.get_match(prompts[index % len(prompts)])
            assert mask.all()
            tasks.append(task)

        tasks: list[int] = []
        get_match_us = median_us(match, undo=lambda: store.cancel([tasks.pop()]))
        hashing_us = median_us(lambda i: hasher.hash_blocks_packed(prompts[i % len(prompts)]))
        sequence_us = median_us(lambda i: SequenceMeta.from_tokens(prompts[i % len(prompts)], BLOCK, hasher))
    document = {
        "benchmark": "flexkv_get_match",
        "environment": environment(),
        "prompt_tokens": PROMPT_TOKENS,
        "stored_blocks": STORED_BLOCKS,
        "get_match_us": get_match_us,
        "of_which": {"hashing_us": hashing_us, "sequence_us": sequence_us},
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
