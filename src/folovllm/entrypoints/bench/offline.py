"""The engine in this process: latency of a batch, throughput of many prompts. Mirrors vllm/benchmarks."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from rich.console import Console
from rich.progress import track

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.entrypoints.bench.options import LatencyOptions, ThroughputOptions
from folovllm.entrypoints.bench.report import report, summarize
from folovllm.entrypoints.bench.workload import Sample, make_samples
from folovllm.errors import EngineDeadError
from folovllm.sampling_params import SamplingParams


class _Bench:
    """An engine that completes workloads. Prompts are token ids: no tokenizer is needed or measured."""

    def __init__(self, args: EngineArgs) -> None:
        self.engine = LLMEngine.from_engine_args(replace(args, skip_tokenizer_init=True))

    def close(self) -> None:
        """Release the model."""
        self.engine.shutdown()

    def run(self, samples: Sequence[Sample]) -> float:
        """Complete all; returns the seconds it took.

        Raises:
            InvalidRequestError: a sample does not fit the model's context.
            EngineDeadError: the engine gave one up.
        """
        vocab_size = self.engine.processor.facts.vocab_size
        prompts = [sample.token_ids(vocab_size) for sample in samples]
        params = [SamplingParams(max_tokens=s.output_len, temperature=0.0, ignore_eos=True) for s in samples]
        begin = time.perf_counter()
        requests = self.engine.add_requests(prompts, params)
        while not all(request.finished for request in requests):
            self.engine.step()
        seconds = time.perf_counter() - begin
        for request, sample in zip(requests, samples, strict=True):
            made = sum(state.num_output_tokens for state in request.states)
            if made != sample.output_len:
                raise EngineDeadError(f"a request ended after {made} of {sample.output_len} tokens; see the log")
        return seconds


def bench_latency(args: EngineArgs, options: LatencyOptions) -> None:
    """Time one batch of random prompts several times; every run has prompts of its own.

    Raises:
        FoloVLLMError: an option or the model is not usable.
        OSError: the result cannot be written.
    """
    options.check()
    size = options.batch_size
    with closing(_Bench(args)) as bench:
        seconds = []
        runs = options.num_iters_warmup + options.num_iters
        for index in track(range(runs), description="runs", console=Console(stderr=True)):
            seed = options.prompt_seed + index
            seconds.append(bench.run(make_samples(size, options.input_len, options.output_len, 0.0, seed)))
    measured = seconds[options.num_iters_warmup :]
    figures = {
        "batch size": size,
        "input tokens": options.input_len,
        "output tokens": options.output_len,
        "runs": options.num_iters,
        "latency (s)": summarize(measured),
    }
    report("latency", figures, options.output_json)


def bench_throughput(args: EngineArgs, options: ThroughputOptions) -> None:
    """Time a workload of random prompts once, after a small one that warms up.

    Raises:
        FoloVLLMError: an option or the model is not usable.
        OSError: the result cannot be written.
    """
    options.check()
    samples = make_samples(
        options.num_prompts, options.input_len, options.output_len, options.range_ratio, options.prompt_seed
    )
    with closing(_Bench(args)) as bench:
        bench.run(make_samples(1, min(32, options.input_len), 2, 0.0, options.prompt_seed + 1))
        seconds = bench.run(samples)
    prompt, output = sum(s.prompt_len for s in samples), sum(s.output_len for s in samples)
    figures = {
        "prompts": len(samples),
        "prompt tokens": prompt,
        "output tokens": output,
        "seconds": seconds,
        "requests/s": len(samples) / seconds,
        "output tokens/s": output / seconds,
        "total tokens/s": (prompt + output) / seconds,
    }
    report("throughput", figures, options.output_json)
