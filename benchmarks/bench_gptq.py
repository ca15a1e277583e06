"""The int4 linear layer against the bf16 one and torch's own int4 product, in the same run.

    python benchmarks/bench_gptq.py [--short] [--threads 2] [--out FILE]

Workload: the four projections of a Qwen3-0.6B layer, as many copies of them as it takes to leave the caches behind, one
after the other as in a forward pass; M rows of bf16. Runs take turns, so that a busy machine slows all alike; the best
of each counts. The limit is what the same threads read from memory, measured in the run.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench_environment import environment
from folovllm import _native
from folovllm.model_executor.layers.linear_weights import LinearShape, PackedWeights
from folovllm.model_executor.layers.quantization import GPTQConfig, GPTQLinearWeights
from folovllm.ops.workspace import Workspace
from folovllm.quantization.packing import pack_words, pack_zeros

# (inputs, outputs): q, k and v; o; gate and up; down.
PROJECTIONS = [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)]
GROUP_SIZE = 128
DECODE_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (512, 2048)
CPU = torch.device("cpu")
# Threads of the run before still spin for a while, on the cores of this one; then some layers wake its own.
SETTLE_S = 0.03


@dataclass
class Layers:
    """Copies of all projections in one form; `run[i]` computes one."""

    run: list[Callable[[torch.Tensor], object]]
    inputs: list[int]
    num_bytes: int


def whole(num_inputs: int, num_outputs: int) -> LinearShape:
    return LinearShape(num_inputs, (num_outputs,), False, False, slice(0, num_inputs), (slice(0, num_outputs),))


def bf16_layers(copies: int) -> Layers:
    layers, workspace = [], Workspace(CPU)
    for num_inputs, num_outputs in PROJECTIONS * copies:
        weights = PackedWeights(whole(num_inputs, num_outputs), torch.bfloat16, workspace, batch_invariant=False)
        weights.load(0, "weight", torch.randn(num_outputs, num_inputs).bfloat16())
        layers.append(weights)
    num_bytes = sum(layer.packed.nbytes for layer in layers)
    return Layers([layer.forward for layer in layers], [k for k, _ in PROJECTIONS * copies], num_bytes)


def int4_layers(copies: int, batch_invariant: bool) -> Layers:
    layers, workspace = [], Workspace(CPU)
    config = GPTQConfig(4, GROUP_SIZE, False, True)
    for num_inputs, num_outputs in PROJECTIONS * copies:
        weights = GPTQLinearWeights(
            config, whole(num_inputs, num_outputs), torch.bfloat16, workspace, batch_invariant=batch_invariant
        )
        groups = num_inputs // GROUP_SIZE
        tensors = {
            "qweight": pack_words(torch.randint(0, 16, (num_inputs, num_outputs)), 4, 0),
            "qzeros": pack_zeros(torch.full((groups, num_outputs), 8), 4, 1),
            "scales": torch.rand(groups, num_outputs).half() / 100,
            "g_idx": (torch.arange(num_inputs) // GROUP_SIZE).int(),
        }
        for suffix, tensor in tensors.items():
            weights.load(0, suffix, tensor)
        weights.finish()
        layers.append(weights)
    num_bytes = sum(kernel.nbytes for layer in layers for _, _, kernel in layer.kernels)
    return Layers([layer.forward for layer in layers], [k for k, _ in PROJECTIONS * copies], num_bytes)


def torch_int4_layers(copies: int) -> Layers:
    run, num_bytes = [], 0
    for num_inputs, num_outputs in PROJECTIONS * copies:
        q = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        scales = torch.rand(num_inputs // GROUP_SIZE, num_outputs, 2).bfloat16()
        num_bytes += packed.nbytes + scales.nbytes

        def product(x: torch.Tensor, packed: torch.Tensor = packed, scales: torch.Tensor = scales) -> object:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales)

        run.append(product)
    return Layers(run, [k for k, _ in PROJECTIONS * copies], num_bytes)


def read_bandwidth(num_bytes: int, repeat: int) -> float:
    data = torch.ones(num_bytes // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return num_bytes / best


def best_seconds(forms: dict[str, Layers], num_rows: int, repeat: int, copies: int) -> dict[str, float]:
    """Seconds of `copies` forward passes over the projections."""
    count = copies * len(PROJECTIONS)
    inputs = {k: torch.randn(num_rows, k).bfloat16() for k, _ in PROJECTIONS}
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(repeat):
        for name, layers in forms.items():
            work = [(run, inputs[k]) for run, k in zip(layers.run[:count], layers.inputs, strict=False)]
            time.sleep(SETTLE_S)
            warm_until = time.perf_counter() + SETTLE_S
            while time.perf_counter() < warm_until:
                for run, x in work:
                    run(x)
            begin = time.perf_counter()
            for run, x in work:
                run(x)
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def measure(num_rows: int, forms: dict[str, Layers], copies: int, repeat: int, bandwidth: float) -> dict[str, object]:
    is_decode = num_rows <= max(DECODE_ROWS)
    used = copies if is_decode else max(1, copies // 4)
    seconds = best_seconds(forms, num_rows, repeat, used)
    share = used / copies
    row: dict[str, object] = {
        "rows": num_rows,
        **{f"{name}_us_per_layer": round(s / used * 1e6, 1) for name, s in seconds.items()},
        "int4_speed_of_bf16": round(seconds["bf16"] / seconds["int4"], 3),
        "int4_speed_of_torch_int4": round(seconds["torch_int4"] / seconds["int4"], 3),
    }
    if is_decode:
        for name in ("int4", "bf16"):
            row[f"{name}_of_read_bandwidth"] = round(forms[name].num_bytes * share / seconds[name] / bandwidth, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer copies and repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the document here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _native.set_num_threads(args.threads)
    copies, repeat = (4, 5) if args.short else (28, 15)
    forms = {
        "bf16": bf16_layers(copies),
        "int4": int4_layers(copies, batch_invariant=False),
        "int4_invariant": int4_layers(copies, batch_invariant=True),
        "torch_int4": torch_int4_layers(copies),
    }
    bandwidth = read_bandwidth((1 << 28) if args.short else (1 << 30), repeat)
    rows = DECODE_ROWS + (PREFILL_ROWS[:1] if args.short else PREFILL_ROWS)
    document = {
        "benchmark": "gptq",
        "environment": environment(),
        "isa": _native.current_isa(),
        "threads": args.threads,
        "read_gb_s": round(bandwidth / 1e9, 2),
        "results": [
            measure(n, forms, copies, repeat if n <= max(DECODE_ROWS) else max(2, repeat // 3), bandwidth) for n in rows
        ],
    }
    text = json.dumps(document, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
