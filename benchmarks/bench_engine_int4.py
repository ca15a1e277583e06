"""folovllm with 4-bit layers beside itself in bf16: decode, time to first token, memory.

    python benchmarks/bench_engine_int4.py [--short] [--threads 2]

Qwen3-0.6B's shape with random weights; the layers as GPTQ has them (4 bits, groups of 128, symmetric). The output head,
a quarter of the bf16 model and more than half of the bytes of the other, is measured in bf16, as most GPTQ checkpoints
have it, and in 8 bits. All engines are alive and measured in turn; figures are medians. The limit of each is what
reading all its weights once per step would allow.
"""

import argparse
import contextlib
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_environment import environment
from engines.checkpoint import QWEN3_06B, write_checkpoint, write_gptq_checkpoint
from engines.limits import read_gb_per_s
from engines.process import EngineProcess, own_python

GROUP_SIZE = 128
SCALE_BITS = 16 / GROUP_SIZE  # of each weight's share of its group's scale
# Bits of a weight of the layers, and of the output head.
VARIANTS = {"bf16": (16, 16), "int4": (4, 16), "int4, 8-bit head": (4, 8)}
PROMPT_TOKENS, TTFT_TOKENS = 32, 512
DECODE_TOKENS = {1: 48, 8: 32}


def weight_bytes(bits: int, head_bits: int) -> float:
    """Bytes that a decode step reads: the layers and the output head, with the scales of what is quantised."""
    sizes = (QWEN3_06B.linear_parameters, bits), (QWEN3_06B.vocab * QWEN3_06B.hidden, head_bits)
    return sum(num_weights * (width + (SCALE_BITS if width < 16 else 0)) / 8 for num_weights, width in sizes)


def write_models(directory: Path) -> dict[str, Path]:
    return {
        name: write_checkpoint(directory / name, QWEN3_06B)
        if bits == 16
        else write_gptq_checkpoint(directory / name, QWEN3_06B, GROUP_SIZE, head_bits)
        for name, (bits, head_bits) in VARIANTS.items()
    }


def measure(engines: dict[str, EngineProcess], repeats: int) -> dict[str, dict[str, float]]:
    rng = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[rng.randrange(QWEN3_06B.vocab) for _ in range(length)] for _ in range(count)]

    values: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            figures = {"TTFT 512 tokens (s)": engine.generate(prompts(1, TTFT_TOKENS), 1)["seconds"]}
            for batch, num_tokens in DECODE_TOKENS.items():
                rate = engine.decode_tokens_per_s(prompts(batch, PROMPT_TOKENS), num_tokens)
                figures[f"decode batch {batch} (tokens/s)"] = rate
            for figure, value in figures.items() if turn > 0 else ():
                values.setdefault(figure, {}).setdefault(name, []).append(value)
    return {figure: {name: statistics.median(of) for name, of in by.items()} for figure, by in values.items()}


def compare(directory: Path, threads: int, repeats: int) -> dict[str, Any]:
    models = write_models(directory)
    bandwidth = read_gb_per_s(threads)
    options = {
        "dtype": "bfloat16",
        "num_threads": threads,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "prefix_caching": False,
        "kv_cache_gb": 1,
    }
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(EngineProcess("folovllm", own_python(), model, options))
            for name, model in models.items()
        }
        figures = measure(engines, repeats)
        resident = {name: engine.resident_bytes() / 1e6 for name, engine in engines.items()}
    decode = figures["decode batch 1 (tokens/s)"]
    limits = {name: bandwidth * 1e9 / weight_bytes(*bits) for name, bits in VARIANTS.items()}
    return {
        "read_gb_per_s": bandwidth,
        "figures": figures | {"resident (MB)": resident},
        "over_bf16": {
            figure: {name: value / of["bf16"] for name, value in of.items() if name != "bf16"}
            for figure, of in figures.items()
        },
        "decode batch 1 over bf16 by bytes": {
            name: weight_bytes(*VARIANTS["bf16"]) / weight_bytes(*bits) for name, bits in VARIANTS.items()
        },
        "decode batch 1 of the limit": {name: decode[name] / limit for name, limit in limits.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = compare(Path(directory), arguments.threads, 3 if arguments.short else 7)
    head = {"benchmark": "engine_int4", "environment": environment("kvstrata", "torch"), "threads": arguments.threads}
    print(json.dumps(head | result, indent=2))


if __name__ == "__main__":
    main()
