"""Native linear layers of folovllm: weights read per second for few rows, products per second for many.

    python benchmarks/bench_linear.py [--threads 2] [--repeat 9] [--isa amx] [--short]

Workload: the linear layers of Qwen3-0.6B in bf16. Few rows go through all 28 layers in turn (0.88 GB), or through the
output layer (0.31 GB); the limit is a plain sum over 1 GiB on huge pages, by as many threads. Many rows go through one
layer; the peers are torch's F.linear, and oneDNN on weights that it has packed. Runs take turns, so that a busy machine
slows all; medians, and the best of each, from which the ratios are.
"""

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable

import torch

from bench_environment import environment
from folovllm import _native

# (name, out_features, in_features)
LAYER = [("qkv_proj", 4096, 1024), ("o_proj", 1024, 2048), ("gate_up_proj", 6144, 1024), ("down_proj", 1024, 3072)]
LM_HEAD = ("lm_head", 151936, 1024)
NUM_LAYERS = 28
FEW_ROWS = [1, 2, 4, 8, 16]
LM_HEAD_ROWS = [1, 4, 16, 32, 64]
MANY_ROWS = [32, 128, 512, 2048]
READ_BYTES = 1 << 30
# Threads of the run before still spin for a while, on this one's cores; then a run that is not timed wakes its own.
SETTLE_S = 0.03

Runs = dict[str, Callable[[], object]]


def measure(runs: Runs, repeat: int) -> dict[str, list[float]]:
    """Seconds of each run, which take turns; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            time.sleep(SETTLE_S)
            run()
            begin = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def rates(seconds: dict[str, list[float]], work: dict[str, float]) -> dict[str, dict[str, float]]:
    """Work per second, in units of 1e9: of the best run and of the median."""
    return {
        name: {
            "best": round(work[name] / min(times) / 1e9, 2),
            "median": round(work[name] / statistics.median(times) / 1e9, 2),
        }
        for name, times in seconds.items()
    }


def pack(weight: torch.Tensor) -> _native.PackedLinear:
    layer = _native.PackedLinear(*weight.shape, "bfloat16")
    layer.fill(0, weight.shape[0], weight.data_ptr(), weight.stride(0), "bfloat16")
    return layer


def forward(layers: list[_native.PackedLinear], x: torch.Tensor, out: torch.Tensor, dtype: str = "bfloat16") -> None:
    for layer in layers:
        layer.forward(
            x.data_ptr(), len(x), layer.in_features, out.data_ptr(), layer.out_features, dtype, batch_invariant=False
        )


def readers() -> Runs:
    """Plain ways to read memory, of which the fastest is the limit."""
    memory = mmap.mmap(-1, READ_BYTES)
    memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    return {"read_sum": values.sum, "read_dot": lambda: torch.dot(values, values), "read_max": values.max}


def measure_few_rows(repeat: int) -> dict[str, object]:
    layers = [pack(torch.randn(n, k).bfloat16()) for _ in range(NUM_LAYERS) for _, n, k in LAYER]
    head = pack(torch.randn(LM_HEAD[1], LM_HEAD[2]).bfloat16())
    x = torch.randn(max(LM_HEAD_ROWS), 4096).bfloat16()
    out = torch.empty(max(LM_HEAD_ROWS), LM_HEAD[1])
    runs, work = readers(), {}
    work = dict.fromkeys(runs, float(READ_BYTES))
    for rows in FEW_ROWS:
        runs[f"layers_m{rows}"] = lambda rows=rows: forward(layers, x[:rows], out)
        work[f"layers_m{rows}"] = float(sum(layer.nbytes for layer in layers))
    for rows in LM_HEAD_ROWS:
        runs[f"lm_head_m{rows}"] = lambda rows=rows: forward([head], x[:rows], out, "float32")
        work[f"lm_head_m{rows}"] = float(head.nbytes)
    result = rates(measure(runs, repeat), work)
    limit = max(rate["best"] for name, rate in result.items() if name.startswith("read_"))
    fractions = {name: round(rate["best"] / limit, 3) for name, rate in result.items() if not name.startswith("read_")}
    return {"gb_s": result, "read_limit_gb_s": limit, "fraction_of_read_limit": fractions}


def measure_many_rows(name: str, out_features: int, in_features: int, rows: int, repeat: int) -> dict[str, object]:
    weight = torch.randn(out_features, in_features).bfloat16()
    layer = pack(weight)
    x = torch.randn(rows, in_features).bfloat16()
    out = torch.empty(rows, out_features, dtype=torch.bfloat16)
    peer = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    runs: Runs = {
        "own": lambda: forward([layer], x, out),
        "f_linear": lambda: torch.nn.functional.linear(x, weight),
        "prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x, peer, None, "none", [], ""),
    }
    flop = 2.0 * rows * out_features * in_features
    result = rates(measure(runs, repeat), dict.fromkeys(runs, flop))
    return {
        "layer": name,
        "rows": rows,
        "gflop_s": result,
        "own_over_f_linear": round(result["own"]["best"] / result["f_linear"]["best"], 2),
        "own_over_prepacked": round(result["own"]["best"] / result["prepacked"]["best"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--isa", default=_native.detected_isa(), help="instruction set of the native kernels, at most")
    parser.add_argument("--short", action="store_true", help="one layer, two numbers of rows, three repeats")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _native.set_num_threads(args.threads)
    _native.limit_isa(args.isa)
    repeat = 3 if args.short else args.repeat
    layers, many = (LAYER[2:3], [32, 512]) if args.short else (LAYER, MANY_ROWS)
    document = {
        "benchmark": "linear",
        "environment": environment("kvstrata", "torch"),
        "threads": args.threads,
        "isa": _native.current_isa(),
        "few_rows": measure_few_rows(repeat),
        "many_rows": [
            measure_many_rows(name, n, k, rows, max(repeat, 20) if rows <= 128 else repeat)
            for name, n, k in layers
            for rows in many
        ],
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
