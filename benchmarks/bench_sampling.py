"""The engine's draw on a CPU against a sort of the vocabulary and against torch.topk, in the same run.

    python benchmarks/bench_sampling.py [--short] [--threads 2] [--repeat 15]

Rows of 151,936 logits (Qwen3's vocabulary), as peaked as a trained model's or as flat as a random one's. The peers do
what samplers in torch do: sort, cut, softmax, multinomial; or, for top-k, torch.topk and then the same. `read` is a sum
over the logits. Runs take turns, so that a busy machine slows all; the best of each counts.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from bench_environment import environment
from folovllm import _native
from folovllm.sample.ops import native
from folovllm.sample.ops.topk_topp import draw_with_torch

VOCAB_SIZE = 151_936
# (name, top_k, top_p, min_p); 0, 1 and 0 restrict nothing.
# Threads of the run before still spin for a while, on the cores of this one.
SETTLE_S = 0.03
RESTRICTIONS = [
    ("none", 0, 1.0, 0.0),
    ("min_p 0.05", 0, 1.0, 0.05),
    ("top_k 64, top_p 0.9", 64, 0.9, 0.0),
    ("top_k 1000", 1000, 1.0, 0.0),
    ("top_p 0.9", 0, 0.9, 0.0),
]


def logits_of(kind: str, num_rows: int) -> torch.Tensor:
    """Flat: normal numbers. Peaked: the same with a tail of likely tokens, probabilities falling as 1 / rank^1.5."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=generator)
    if kind == "peaked":
        likely = torch.randint(VOCAB_SIZE, (num_rows, 2000), generator=generator)
        ranks = torch.arange(1, 2001, dtype=torch.float32)
        logits.scatter_(1, likely, (18.0 - 1.5 * ranks.log()).expand(num_rows, -1))
    return logits


def cut_and_draw(ordered: torch.Tensor, token_ids: torch.Tensor, top_p: float, min_p: float) -> torch.Tensor:
    """The usual way on sorted rows."""
    probs = torch.softmax(ordered, dim=-1)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    return token_ids.gather(1, torch.multinomial(probs, 1)).squeeze(1)


def draw_by_sort(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    ordered, token_ids = logits.sort(dim=-1, descending=True)
    if top_k:
        ordered = ordered.masked_fill(torch.arange(VOCAB_SIZE) >= top_k, float("-inf"))
    return cut_and_draw(ordered, token_ids, top_p, min_p)


def draw_by_topk(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    return cut_and_draw(*logits.topk(top_k, dim=-1), top_p, min_p)


def best_ms(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeat):
        for name, function in functions.items():
            time.sleep(SETTLE_S)
            begin = time.perf_counter()
            function()
            best[name] = min(best[name], (time.perf_counter() - begin) * 1e3)
    return best


def compare(best: dict[str, float]) -> dict[str, float]:
    """Times, and how many times as long as the kernel each peer takes."""
    times = {f"{name}_ms": round(ms, 3) for name, ms in best.items()}
    return times | {f"{name}_ratio": round(ms / best["native"], 2) for name, ms in best.items() if name != "native"}


def measure_draw(kind: str, num_rows: int, restriction: tuple[str, int, float, float], repeat: int) -> dict:
    name, top_k, top_p, min_p = restriction
    logits = logits_of(kind, num_rows)
    uniform = np.random.default_rng(0).random(num_rows)
    options = (
        np.full(num_rows, top_k),
        np.full(num_rows, top_p, np.float32),
        uniform,
        np.full(num_rows, min_p, np.float32),
    )
    functions = {
        "native": lambda: native.draw(logits, *options),
        "read": lambda: logits.sum(),
        "torch_draw": lambda: draw_with_torch(logits, *options),
        "sort": lambda: draw_by_sort(logits, top_k, top_p, min_p),
    }
    if top_k:
        functions["topk"] = lambda: draw_by_topk(logits, top_k, top_p, min_p)
    return {"logits": kind, "rows": num_rows, "restriction": name, **compare(best_ms(functions, repeat))}


def measure_argmax(dtype: torch.dtype, num_rows: int, repeat: int) -> dict:
    logits = logits_of("flat", num_rows).to(dtype)
    functions = {
        "native": lambda: native.argmax(logits),
        "read": lambda: logits.view(torch.int32).sum(),
        "torch": lambda: logits.argmax(dim=-1),
    }
    best = best_ms(functions, repeat)
    gb_s = logits.numel() * logits.element_size() / best["native"] / 1e6
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "rows": num_rows, "native_gb_s": round(gb_s, 1), **compare(best)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rows and runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    repeat = 3 if args.short else args.repeat
    torch.set_num_threads(args.threads)
    _native.set_num_threads(args.threads)
    sizes = [4] if args.short else [1, 16, 64]
    document = {
        "benchmark": "sampling",
        "environment": environment(),
        "threads": args.threads,
        "instructions": _native.current_isa(),
        "vocab_size": VOCAB_SIZE,
        "draw": [
            measure_draw(kind, rows, restriction, repeat)
            for rows in sizes
            for kind in ("peaked", "flat")
            for restriction in RESTRICTIONS
        ],
        "argmax": [measure_argmax(dtype, rows, repeat) for rows in sizes for dtype in (torch.float32, torch.bfloat16)],
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
