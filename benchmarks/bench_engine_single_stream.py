"""folovllm beside transformers and llama.cpp, one request at a time: decode, time to first token, start.

    python benchmarks/bench_engine_single_stream.py [--short] [--no-llama] [--threads 2]

All hold the same random bf16 weights of Qwen3-0.6B's shape (llama.cpp as GGUF, built from source on first use), are
alive at once and measured in turn; figures are medians. `agreement` is the share of greedy tokens that equal
folovllm's, over a prompt's first answer: bf16 sums of another order part ways where two tokens are nearly as likely.
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
from engines.checkpoint import QWEN3_06B, write_checkpoint
from engines.limits import gemm_gflop_per_s, read_gb_per_s
from engines.llama_environment import llama_python, write_gguf
from engines.process import EngineProcess, own_python

PROMPT_TOKENS = 32
AGREEMENT_TOKENS = 16


def options(threads: int) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "num_threads": threads,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "prefix_caching": False,
        "kv_cache_gb": 1,
    }


def prompt(rng: random.Random, length: int) -> list[list[int]]:
    return [[rng.randrange(QWEN3_06B.vocab) for _ in range(length)]]


def measure(engines: dict[str, EngineProcess], *, short: bool) -> dict[str, dict[str, float]]:
    rng = random.Random(0)
    repeats, lengths = (3, (512,)) if short else (5, (512, 2048))
    rates: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            values = {"decode (tokens/s)": engine.decode_tokens_per_s(prompt(rng, PROMPT_TOKENS), 32)}
            for length in lengths:
                values[f"TTFT {length} tokens (s)"] = engine.generate(prompt(rng, length), 1)["seconds"]
            for figure, value in values.items() if turn > 0 else ():
                rates.setdefault(figure, {}).setdefault(name, []).append(value)
    return {
        figure: {name: statistics.median(of) for name, of in engines_.items()} for figure, engines_ in rates.items()
    }


def agreement(engines: dict[str, EngineProcess]) -> dict[str, float]:
    request = prompt(random.Random(1), PROMPT_TOKENS)
    answers = {name: engine.generate(request, AGREEMENT_TOKENS)["first_answer"] for name, engine in engines.items()}
    own = answers.pop("folovllm")
    return {
        name: sum(a == b for a, b in zip(own, other, strict=True)) / AGREEMENT_TOKENS for name, other in answers.items()
    }


def compare(directory: Path, threads: int, *, short: bool, with_llama: bool) -> dict[str, Any]:
    checkpoint = write_checkpoint(directory / "qwen3-0.6b", QWEN3_06B)
    limits = {"read_gb_per_s": read_gb_per_s(threads), "gemm_gflop_per_s": gemm_gflop_per_s(threads)}
    python = own_python()
    models = {"folovllm": (python, checkpoint), "transformers": (python, checkpoint)}
    if with_llama:
        models["llama.cpp"] = (llama_python(), write_gguf(llama_python(), checkpoint))
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(EngineProcess(name, interpreter, model, options(threads)))
            for name, (interpreter, model) in models.items()
        }
        figures = {"start to first token (s)": {name: engine.start_s for name, engine in engines.items()}}
        agreeing = agreement(engines)
        figures |= measure(engines, short=short)
    ratios = {
        figure: {name: value / of["folovllm"] for name, value in of.items() if name != "folovllm"}
        for figure, of in figures.items()
    }
    return {"limits": limits, "figures": figures, "others_over_folovllm": ratios, "agreement": agreeing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer figures and rounds")
    parser.add_argument("--no-llama", action="store_true", help="without llama.cpp, which takes minutes to build")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = compare(Path(directory), arguments.threads, short=arguments.short, with_llama=not arguments.no_llama)
    head = {"benchmark": "engine_single_stream", "environment": environment("kvstrata", "torch", "transformers")}
    print(json.dumps({**head, "threads": arguments.threads, **result}, indent=2))


if __name__ == "__main__":
    main()
