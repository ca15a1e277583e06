"""Drives a ModelRunner by scheduler outputs written by hand, so that its tests choose every batch themselves."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.core.sched.output import CachedRequestData, ModelRunnerOutput, NewRequestData, SchedulerOutput
from folovllm.engine.arg_utils import EngineArgs
from folovllm.sampling_params import SamplingParams
from folovllm.worker.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@dataclass
class Tracked:
    """The scheduler's view of one request."""

    prompt: list[int]
    params: SamplingParams
    eos: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    known: bool = False
    resumed: bool = False

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed


def make_runner(model: Path, **options: Any) -> ModelRunner:
    """A runner on the CPU, in fp32 unless told otherwise."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "block_size": 4,
        "num_kv_blocks": 600,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 4096,
    }
    return ModelRunner(EngineArgs(model=str(model), **{**defaults, **options}).resolve())


class RunnerDriver:
    """Allocates blocks in scattered order and keeps each request's tokens."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.block_size = runner.block_size
        self.free = list(range(1, runner.config.cache_config.num_kv_blocks))
        random.Random(7).shuffle(self.free)
        self.requests: dict[str, Tracked] = {}
        self.finished: set[str] = set()
        self.preempted: set[str] = set()

    def add(
        self, req_id: str, prompt: Sequence[int], params: SamplingParams = GREEDY, eos: tuple[int, ...] = ()
    ) -> None:
        self.requests[req_id] = Tracked(list(prompt), params, eos, list(prompt))

    def finish(self, req_id: str) -> Tracked:
        request = self.requests.pop(req_id)
        self.free.extend(request.blocks)
        self.finished.add(req_id)
        return request

    def preempt(self, req_id: str) -> None:
        request = self.requests[req_id]
        self.free.extend(request.blocks)
        request.blocks, request.computed, request.resumed = [], 0, True
        self.preempted.add(req_id)

    def step(self, scheduled: dict[str, int], metadata: Any = None) -> ModelRunnerOutput:
        """Compute that many tokens of each named request; samples are appended to it."""
        new, cached = [], []
        for req_id, num_tokens in scheduled.items():
            request = self.requests[req_id]
            assert 0 < num_tokens <= request.remaining
            wanted = -(-(request.computed + num_tokens) // self.block_size)
            fresh = [self.free.pop() for _ in range(wanted - len(request.blocks))]
            request.blocks += fresh
            if not request.known:
                new.append(self._new(req_id, request))
            else:
                cached.append(self._cached(req_id, request, fresh))
            request.known, request.resumed = True, False
        output = self.runner.execute_model(
            SchedulerOutput(
                scheduled_new_reqs=new,
                scheduled_cached_reqs=cached,
                num_scheduled_tokens=dict(scheduled),
                total_num_scheduled_tokens=sum(scheduled.values()),
                finished_req_ids=self.finished,
                preempted_req_ids=self.preempted,
                kv_connector_metadata=metadata,
            )
        )
        self.finished, self.preempted = set(), set()
        for req_id, num_tokens in scheduled.items():
            request = self.requests[req_id]
            request.computed += num_tokens
            request.tokens += output.sampled_token_ids.get(req_id, [])
        return output

    def step_all(self, chunk: int = 10_000) -> ModelRunnerOutput:
        """Advance every request by at most `chunk` tokens."""
        return self.step({req_id: min(chunk, request.remaining) for req_id, request in self.requests.items()})

    def run(self, num_output: int, chunk: int = 10_000) -> dict[str, list[int]]:
        """Step until every request has `num_output` tokens, finish them, return their outputs."""
        outputs: dict[str, list[int]] = {}
        while self.requests:
            self.step_all(chunk)
            outputs.update(self.collect(num_output))
        return outputs

    def collect(self, num_output: int) -> dict[str, list[int]]:
        """Finish the requests that have `num_output` tokens."""
        done = [req_id for req_id, request in self.requests.items() if len(request.output) >= num_output]
        return {req_id: self.finish(req_id).output[:num_output] for req_id in done}

    def generate(
        self, prompts: Iterable[Sequence[int]], num_output: int, params: SamplingParams = GREEDY, chunk: int = 10_000
    ) -> list[list[int]]:
        """Run prompts as one batch."""
        names = [f"r{i}" for i, prompt in enumerate(prompts) if not self.add(f"r{i}", prompt, params)]
        outputs = self.run(num_output, chunk)
        return [outputs[name] for name in names]

    def _new(self, req_id: str, request: Tracked) -> NewRequestData:
        return NewRequestData(
            req_id, request.prompt, request.params, list(request.blocks), request.computed, request.eos
        )

    def _cached(self, req_id: str, request: Tracked, fresh: list[int]) -> CachedRequestData:
        return CachedRequestData(
            req_id=req_id,
            resumed_from_preemption=request.resumed,
            all_token_ids=list(request.tokens) if request.resumed else None,
            block_ids=list(request.blocks) if request.resumed else fresh,
            num_computed_tokens=request.computed,
        )
