"""folovllm beside vLLM's CPU build on the same checkpoint: decode, time to first token, throughput, start, memory.

    python benchmarks/bench_engine_vs_vllm.py [--short] [--no-vllm] [--threads 2]

Both engines are alive at once and measured in turn, so that a busy machine slows both; figures are medians. The
checkpoint has the shape of Qwen3-0.6B and random bf16 weights. The limits (read bandwidth, matrix product) are measured
in the same run.
"""

import argparse
import contextlib
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_environment import environment
from engines.checkpoint import QWEN3_06B, TINY_5M, ModelShape, write_checkpoint
from engines.limits import gemm_gflop_per_s, read_gb_per_s
from engines.process import EngineProcess, own_python
from engines.vllm_environment import vllm_python

PROMPT_TOKENS = 32
DECODE_TOKENS = {1: 48, 8: 40, 32: 24}
LONG_CONTEXT, LONG_BATCH, LONG_TOKENS = 8192, 8, 16
MIXED_REQUESTS = 64

Engines = dict[str, EngineProcess]
Figures = dict[str, dict[str, float]]


class Prompts:
    """Random prompts, never the same twice."""

    def __init__(self, shape: ModelShape) -> None:
        self._random = random.Random(0)
        self._vocab = shape.vocab

    def make(self, count: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(self._vocab) for _ in range(length)] for _ in range(count)]


def in_turn(engines: Engines, measure: Callable[[EngineProcess], float], repeats: int) -> dict[str, float]:
    """Median of each engine, measured in turn after one unmeasured round."""
    values: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(repeats + 1):
        for name, engine in engines.items():
            value = measure(engine)
            if i > 0:
                values[name].append(value)
    return {name: statistics.median(of) for name, of in values.items()}


def measure_main(engines: Engines, repeats: int, *, short: bool) -> Figures:
    prompts = Prompts(QWEN3_06B)
    figures: Figures = {}
    for batch, num_tokens in DECODE_TOKENS.items():
        if short and batch > 8:
            continue
        figures[f"decode batch {batch} (tokens/s)"] = in_turn(
            engines,
            lambda engine, b=batch, n=num_tokens: engine.decode_tokens_per_s(prompts.make(b, PROMPT_TOKENS), n),
            repeats,
        )
    for length in (512,) if short else (512, 2048):
        figures[f"TTFT {length} tokens (s)"] = in_turn(
            engines, lambda engine, n=length: engine.generate(prompts.make(1, n), 1)["seconds"], repeats
        )
    if not short:
        lengths = random.Random(1)
        sizes = [(lengths.randint(64, 512), lengths.randint(16, 256)) for _ in range(MIXED_REQUESTS)]

        def mixed(engine: EngineProcess) -> float:
            result = engine.generate([prompts.make(1, n)[0] for n, _ in sizes], [out for _, out in sizes])
            return result["num_output_tokens"] / result["seconds"]

        figures["64 mixed requests (tokens/s)"] = in_turn(engines, mixed, repeats)
    return figures


def measure_long_context(engine: EngineProcess, repeats: int) -> float:
    """Decode of requests whose long prompts are cached already."""
    prompts = Prompts(QWEN3_06B).make(LONG_BATCH, LONG_CONTEXT - LONG_TOKENS - 1)
    engine.generate(prompts, 1)
    return statistics.median(engine.decode_tokens_per_s(prompts, LONG_TOKENS) for _ in range(repeats))


def measure_overhead(engines: Engines, repeats: int) -> dict[str, float]:
    """Milliseconds of a decode step of a model so small that the host decides."""
    prompts = Prompts(TINY_5M)

    def step_ms(engine: EngineProcess) -> float:
        return 64e3 / engine.decode_tokens_per_s(prompts.make(64, 16), 64)

    return in_turn(engines, step_ms, repeats)


def options(threads: int, **changes: Any) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "num_threads": threads,
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "prefix_caching": False,
        "kv_cache_gb": 3,
        **changes,
    }


def start(stack: contextlib.ExitStack, pythons: dict[str, Path], model: Path, settings: dict[str, Any]) -> Engines:
    return {name: stack.enter_context(EngineProcess(name, python, model, settings)) for name, python in pythons.items()}


def against_limits(figures: Figures, limits: dict[str, float]) -> dict[str, float]:
    """Shares of what the machine can do, of folovllm."""
    own = {name: of["folovllm"] for name, of in figures.items()}
    weights_per_s = limits["read_gb_per_s"] * 1e9 / QWEN3_06B.weight_bytes
    shares = {"decode batch 1 of read bandwidth": own["decode batch 1 (tokens/s)"] / weights_per_s}
    for name, value in own.items():
        if name.startswith("TTFT"):
            num_tokens = int(name.split()[1])
            attention = 2 * num_tokens**2 * QWEN3_06B.heads * QWEN3_06B.head_dim * QWEN3_06B.layers
            operations = 2 * num_tokens * QWEN3_06B.linear_parameters + attention
            shares[f"{name} of the matrix product rate"] = operations / value / limits["gemm_gflop_per_s"] / 1e9
    if (long := own.get("decode 8 x 8,192 context (tokens/s)")) is not None:
        step_bytes = QWEN3_06B.weight_bytes + LONG_BATCH * LONG_CONTEXT * QWEN3_06B.kv_bytes_per_token
        shares["decode 8 x 8,192 of read bandwidth"] = long / LONG_BATCH * step_bytes / limits["read_gb_per_s"] / 1e9
    return shares


def compare(pythons: dict[str, Path], directory: Path, threads: int, *, short: bool) -> dict[str, Any]:
    repeats = 3 if short else 5
    model = write_checkpoint(directory / "qwen3-0.6b", QWEN3_06B)
    limits = {"read_gb_per_s": read_gb_per_s(threads), "gemm_gflop_per_s": gemm_gflop_per_s(threads)}
    figures: Figures = {}
    with contextlib.ExitStack() as stack:
        settings = options(threads)
        engines = start(stack, pythons, model, settings)
        figures["start to first token (s)"] = {name: engine.start_s for name, engine in engines.items()}
        figures |= measure_main(engines, repeats, short=short)
        known = QWEN3_06B.weight_bytes + settings["kv_cache_gb"] * 2**30
        figures["resident above weights and KV pool (MB)"] = {
            name: (engine.resident_bytes() - known) / 1e6 for name, engine in engines.items()
        }
    with contextlib.ExitStack() as stack:
        tiny = write_checkpoint(directory / "tiny", TINY_5M)
        engines = start(stack, pythons, tiny, options(threads, kv_cache_gb=1))
        figures["step of a 5M model, batch 64 (ms)"] = measure_overhead(engines, repeats)
    if not short:
        name = "decode 8 x 8,192 context (tokens/s)"
        figures[name] = {}
        for engine, python in pythons.items():  # one at a time: the KV caches of both would not fit
            settings = options(threads, prefix_caching=True, kv_cache_gb=8, max_model_len=LONG_CONTEXT)
            with EngineProcess(engine, python, model, settings) as process:
                figures[name][engine] = measure_long_context(process, repeats)
    ratios = {name: of["folovllm"] / of["vllm"] for name, of in figures.items() if "vllm" in of}
    return {
        "limits": limits,
        "figures": figures,
        "folovllm_over_vllm": ratios,
        "shares": against_limits(figures, limits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer figures and rounds")
    parser.add_argument("--no-vllm", action="store_true", help="folovllm against the machine's limits only")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pythons = {"folovllm": own_python()}
    if not arguments.no_vllm:
        pythons["vllm"] = vllm_python()
    with tempfile.TemporaryDirectory() as directory:
        result = compare(pythons, Path(directory), arguments.threads, short=arguments.short)
    document = {"benchmark": "engine_vs_vllm", "environment": environment(), "threads": arguments.threads, **result}
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
