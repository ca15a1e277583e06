"""Where the host's time goes in a decode step: microseconds of each part, beside those of the kernels.

    python benchmarks/bench_step_overhead.py [--batch 64] [--threads 1] [--tokens 64] [--repeat 5]

A model of about 5M parameters (random weights), the engine in process, greedy requests. Each part is timed without the
parts inside it; a figure is the lower quartile over the steps in which all requests decode, so that a busy machine
blurs it little. Two more figures stand for what a core in a process of its own adds: encoding and decoding the step's
message.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench_environment import environment
from engines.checkpoint import TINY_5M, write_checkpoint
from folovllm.engine.messages import EngineCoreOutputs, FromCore
from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams

PROMPT_TOKENS = 16
KERNELS = ("forward pass", "output head", "choice of tokens")


class Stopwatch:
    """Times of named parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.times: dict[str, list[int]] = {}
        self._inside: list[int] = []

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Time the calls of an object's method from here on."""
        setattr(owner, method, self.timed(getattr(owner, method), part))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        times = self.times.setdefault(part, [])

        def call(*args: Any, **options: Any) -> Any:
            self._inside.append(0)
            start = time.perf_counter_ns()
            result = function(*args, **options)
            taken = time.perf_counter_ns() - start
            times.append(taken - self._inside.pop())
            if self._inside:
                self._inside[-1] += taken
            return result

        return call

    def clear(self) -> None:
        for times in self.times.values():
            times.clear()

    def quartile_us(self, part: str) -> float:
        """The lower quartile."""
        return round(statistics.quantiles(self.times[part], n=4)[0] / 1e3, 2)


def watch_engine(llm: LLM, watch: Stopwatch) -> None:
    """Put the stopwatch around the parts of a step."""
    engine = llm.llm_engine
    core = engine._client._core
    runner = core.executor.worker.model_runner
    watch.watch(core.scheduler, "schedule", "schedule")
    watch.watch(core.scheduler, "update_from_output", "update")
    watch.watch(core, "step", "core")
    watch.watch(engine, "step", "engine")
    watch.watch(engine._outputs, "process", "outputs to requests")
    watch.watch(core.executor, "execute_model", "executor")
    watch.watch(runner.inputs, "prepare", "inputs")
    watch.watch(runner, "_update_states", "rows")
    watch.watch(runner, "_sample", "sampling")
    watch.watch(runner, "compute", "forward pass")
    watch.watch(runner.model, "compute_logits", "output head")
    watch.watch(runner.sampling, "_sampler", "choice of tokens")


def generate(llm: LLM, batch: int, num_tokens: int) -> None:
    dice = random.Random(0)
    prompts = [dice.choices(range(TINY_5M.vocab), k=PROMPT_TOKENS) for _ in range(batch)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))


def message_us(llm: LLM, batch: int) -> dict[str, float]:
    """Encoding and decoding the message of a step in which all requests decode."""
    engine, steps = llm.llm_engine, []
    process = engine._outputs.process
    engine._outputs.process = lambda outputs: (steps.append(outputs), process(outputs))[1]
    generate(llm, batch, 8)
    engine._outputs.process = process
    step: EngineCoreOutputs = steps[-2]
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromCore)
    encoded = encoder.encode(step)
    watch = Stopwatch()
    encode, decode = watch.timed(encoder.encode, "encode"), watch.timed(decoder.decode, "decode")
    for _ in range(200):
        encode(step)
        decode(encoded)
    return {part: watch.quartile_us(part) for part in watch.times} | {"bytes": len(encoded)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the kernels")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens per request")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_checkpoint(Path(directory) / "tiny", TINY_5M)
        with LLM(
            str(model),
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=arguments.batch,
            enable_prefix_caching=False,
            kv_cache_memory_gb=1,
            num_threads=arguments.threads,
        ) as llm:
            generate(llm, arguments.batch, arguments.tokens)
            message = message_us(llm, arguments.batch)
            watch = Stopwatch()
            watch_engine(llm, watch)
            for _ in range(arguments.repeat):
                generate(llm, arguments.batch, arguments.tokens)
            parts = {part: watch.quartile_us(part) for part in watch.times}
    kernels = sum(parts[part] for part in KERNELS)
    document = {
        "benchmark": "step_overhead",
        "environment": environment(),
        "model": "5M parameters",
        "batch": arguments.batch,
        "threads": arguments.threads,
        "parts_us": parts,
        "kernels_us": round(kernels, 1),
        "host_us": round(sum(parts.values()) - kernels, 1),
        "message_us": message,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
