"""folovllm on a GPU against what the card can do: decode, time to first token, and the attention kernel alone.

    python benchmarks/bench_engine_gpu.py [--short] [--enforce-eager]

The checkpoint has the shape of Qwen3-0.6B and random bf16 weights. Limits are the card's own, measured in the same run:
a copy within its memory, and cuBLAS' bf16 product. A decode step must read all weights and the KV of its requests; a
prompt must be multiplied with all weights and attend to itself. Without a GPU it says so, and has no figures.
"""

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_environment import environment
from engines.checkpoint import QWEN3_06B, ModelShape, write_checkpoint
from engines.gpu_limits import copy_gb_per_s, gemm_tflop_per_s, gpu_seconds
from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.selector import select_backend
from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams

SHAPE = QWEN3_06B
BLOCK_SIZE = 16
DECODE_BATCHES = (1, 8, 64)
PROMPT_TOKENS, DECODE_TOKENS = 128, 256
TTFT_TOKENS = (512, 2048)
# (batch, context) of decodes, and (chunk, context) of prefills.
DECODE_SHAPES = [(1, 1024), (1, 32768), (8, 8192), (64, 1024), (64, 8192)]
PREFILL_SHAPES = [(512, 512), (2048, 2048), (8192, 8192), (512, 8192)]
COLD_BYTES = 1 << 30
"""KV of all the layers that a kernel's calls go through in turn: more than an L2 cache holds."""

Figures = dict[str, dict[str, float]]


class Attention:
    """One layer's launches over requests of (query_len, seq_len), the cache of another layer in each call."""

    def __init__(self, lens: list[tuple[int, int]], device: torch.device) -> None:
        columns = max(-(-seq_len // BLOCK_SIZE) for _, seq_len in lens)
        num_blocks = len(lens) * columns + 1
        shape = (num_blocks, 2, SHAPE.kv_heads, BLOCK_SIZE, SHAPE.head_dim)
        cache_bytes = 2 * int(np.prod(shape))
        caches = [
            torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(max(1, COLD_BYTES // cache_bytes))
        ]
        self._caches = itertools.cycle(caches)
        starts = np.cumsum([0, *(query_len for query_len, _ in lens)]).astype(np.int32)
        seq_lens = np.array([seq_len for _, seq_len in lens], dtype=np.int32)
        unused = torch.zeros(int(starts[-1]), dtype=torch.int64, device=device)
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(starts).to(device),
            seq_lens=torch.from_numpy(seq_lens).to(device),
            block_tables=(torch.randperm(num_blocks - 1).view(len(lens), columns) + 1).int().to(device),
            slot_mapping=unused,
            slot_blocks=unused,
            slot_offsets=unused,
            query_start_loc_cpu=starts,
            seq_lens_cpu=seq_lens,
        )
        backend_class = select_backend("auto", device, torch.bfloat16, SHAPE.head_dim)
        self._backend = backend_class(SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, BLOCK_SIZE)
        self._metadata = dataclasses.replace(metadata, backend_plan=self._backend.plan(metadata))
        size = (int(starts[-1]), SHAPE.heads, SHAPE.head_dim)
        self._query = torch.randn(size, device=device, dtype=torch.bfloat16)
        self.backend_name = backend_class.name

    def __call__(self) -> torch.Tensor:
        return self._backend.forward(self._query, next(self._caches), self._metadata)


def kv_bytes(num_tokens: int) -> float:
    """bf16 K and V of one layer."""
    return 2.0 * 2 * num_tokens * SHAPE.kv_heads * SHAPE.head_dim


def attention_flop(query_len: int, seq_len: int) -> float:
    """Of one layer: two products over the visible half of the last `query_len` rows."""
    visible = query_len * (seq_len - query_len) + query_len * (query_len + 1) / 2
    return 4.0 * visible * SHAPE.heads * SHAPE.head_dim


def measure_attention(device: torch.device, limits: dict[str, float], *, short: bool) -> dict[str, Any]:
    figures: Figures = {}
    for batch, context in DECODE_SHAPES[1:4] if short else DECODE_SHAPES:
        attention = Attention([(1, context)] * batch, device)
        taken = gpu_seconds(attention)
        gb_per_s = kv_bytes(batch * context) / taken / 1e9
        share = gb_per_s / limits["copy_gb_per_s"]
        figures[f"decode {batch} x {context}"] = {"us": taken * 1e6, "kv_gb_per_s": gb_per_s, "of_copy": share}
    for query_len, seq_len in PREFILL_SHAPES[:2] if short else PREFILL_SHAPES:
        attention = Attention([(query_len, seq_len)], device)
        taken = gpu_seconds(attention)
        tflop_per_s = attention_flop(query_len, seq_len) / taken / 1e12
        share = tflop_per_s / limits["gemm_tflop_per_s"]
        figures[f"prefill {query_len} of {seq_len}"] = {
            "us": taken * 1e6,
            "tflop_per_s": tflop_per_s,
            "of_gemm": share,
        }
    return {"backend": attention.backend_name, **figures}


class Engine:
    """The engine in this process, and prompts that it never saw before."""

    def __init__(self, model: Path, **options: Any) -> None:
        started = time.perf_counter()
        self.llm = LLM(
            str(model),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=max(DECODE_BATCHES),
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            kv_cache_memory_gb=8,
            **options,
        )
        self._random = random.Random(0)
        self.seconds([16], 1)
        self.start_s = time.perf_counter() - started

    def seconds(self, lengths: list[int], num_output: int) -> float:
        """Time to generate so many tokens for prompts of these lengths."""
        prompts = [[self._random.randrange(SHAPE.vocab) for _ in range(length)] for length in lengths]
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        started = time.perf_counter()
        self.llm.generate(prompts, params)
        return time.perf_counter() - started


def median(values: list[float]) -> float:
    """Without the first, which warms up."""
    return statistics.median(values[1:])


def measure_engine(engine: Engine, limits: dict[str, float], repeats: int) -> Figures:
    figures: Figures = {}
    for batch in DECODE_BATCHES:
        prompts = [PROMPT_TOKENS] * batch
        step = median(
            [
                (engine.seconds(prompts, DECODE_TOKENS) - engine.seconds(prompts, 1)) / (DECODE_TOKENS - 1)
                for _ in range(repeats + 1)
            ]
        )
        context = PROMPT_TOKENS + DECODE_TOKENS // 2
        gb_per_s = step_bytes(SHAPE, batch, context) / step / 1e9
        figures[f"decode batch {batch}"] = {
            "tokens_per_s": batch / step,
            "step_ms": step * 1e3,
            "gb_per_s": gb_per_s,
            "of_copy": gb_per_s / limits["copy_gb_per_s"],
        }
    for length in TTFT_TOKENS:
        taken = median([engine.seconds([length], 1) for _ in range(repeats + 1)])
        flop = 2.0 * length * SHAPE.linear_parameters + SHAPE.layers * attention_flop(length, length)
        tflop_per_s = flop / taken / 1e12
        figures[f"TTFT {length} tokens"] = {
            "ms": taken * 1e3,
            "tflop_per_s": tflop_per_s,
            "of_gemm": tflop_per_s / limits["gemm_tflop_per_s"],
        }
    return figures


def step_bytes(shape: ModelShape, batch: int, context: int) -> float:
    """What a decode step reads at least."""
    return shape.weight_bytes + float(batch) * context * shape.kv_bytes_per_token


def measure(device: torch.device, *, short: bool, enforce_eager: bool) -> dict[str, Any]:
    limits = {"copy_gb_per_s": copy_gb_per_s(device), "gemm_tflop_per_s": gemm_tflop_per_s(device)}
    document: dict[str, Any] = {"limits": limits, "attention": measure_attention(device, limits, short=short)}
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as directory:
        model = write_checkpoint(Path(directory) / "qwen3-0.6b", SHAPE)
        engine = Engine(model, device=device.type, enforce_eager=enforce_eager)
        with engine.llm:
            document["start_s"] = engine.start_s
            document["engine"] = measure_engine(engine, limits, repeats=2 if short else 5)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"benchmark": "engine_gpu", "environment": environment("kvstrata", "torch", "triton")}
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure", file=sys.stderr)
        document["gpu"] = "no GPU"
    else:
        document["gpu"] = torch.cuda.get_device_name()
        document["enforce_eager"] = arguments.enforce_eager
        document |= measure(torch.device("cuda", 0), short=arguments.short, enforce_eager=arguments.enforce_eager)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
