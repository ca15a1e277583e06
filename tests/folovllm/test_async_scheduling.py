"""Asynchronous scheduling on real (tiny) models gives the tokens of synchronous scheduling."""

import threading
from typing import Any

import pytest
from tests.folovllm.checkpoints import SHAPES
from tests.folovllm.test_exactness import BLOCK, MIXED_LENGTHS, NUM_OUTPUT, TINY_POOL, make_core, prompts_of

from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.engine.messages import EngineCoreOutput, EngineCoreRequest
from folovllm.executor.uniproc_executor import UniProcExecutor
from folovllm.sampling_params import SamplingParams

NAME = "qwen3-wide-heads-gqa2"
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT)
SEEDED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=1234, max_tokens=NUM_OUTPUT)
UNSEEDED = SamplingParams(temperature=1.0, max_tokens=NUM_OUTPUT)
PENALISED = SamplingParams(
    temperature=0.0, max_tokens=NUM_OUTPUT, presence_penalty=1.5, repetition_penalty=1.3, logprobs=2
)
CRAMPED = {"num_kv_blocks": TINY_POOL, "max_num_batched_tokens": 20}


@pytest.fixture
def start(checkpoint):
    """start(asynchronous, **engine options) -> an engine core that is shut down after the test."""
    cores = []

    def make(is_async: bool, **options: Any) -> EngineCore:
        cores.append(make_core(checkpoint(NAME), async_scheduling=is_async, **options))
        return cores[-1]

    yield make
    for core in cores:
        core.shutdown()


def make_request(name: object, prompt: list[int], params: SamplingParams, **fields: Any) -> EngineCoreRequest:
    return EngineCoreRequest(request_id=str(name), prompt_token_ids=prompt, sampling_params=params, **fields)


def run(core: EngineCore, prompts: list[list[int]], params: SamplingParams) -> dict[str, list[Any]]:
    for i, prompt in enumerate(prompts):
        core.add_request(make_request(i, prompt, params))
    return collect(core, len(prompts))


def collect(core: EngineCore, num_requests: int) -> dict[str, list[Any]]:
    """What each request puts out, without its times."""
    outputs: dict[str, list[Any]] = {str(i): [] for i in range(num_requests)}
    while core.has_work:
        for output in core.step().outputs:
            outputs[output.request_id].append(_facts(output))
    return outputs


def _facts(output: EngineCoreOutput) -> tuple[Any, ...]:
    return (output.new_token_ids, output.finish_reason, output.stop_reason, output.new_logprobs)


def num_preemptions(core: EngineCore) -> int:
    return core.scheduler.make_stats().num_preemptions


@pytest.mark.parametrize(
    ("params", "prefix_caching"),
    [(GREEDY, True), (GREEDY, False), (SEEDED, True), (UNSEEDED, False), (PENALISED, True)],
    ids=["greedy", "greedy, no prefix cache", "seeded", "engine's own seeds", "penalties"],
)
def test_same_outputs_though_preempted(params: SamplingParams, prefix_caching: bool, start: Any) -> None:
    system = prompts_of([2 * BLOCK], SHAPES[NAME].vocab)[0]
    prompts = [system + tail for tail in prompts_of(MIXED_LENGTHS, SHAPES[NAME].vocab)]
    results = []
    for is_async in (False, True):
        core = start(is_async, enable_prefix_caching=prefix_caching, **CRAMPED)
        results.append([run(core, prompts, params) for _ in range(2)])  # the second time from the cache
        assert num_preemptions(core) > 0
    assert results[0] == results[1]


def test_same_outputs_under_priorities(start: Any) -> None:
    prompts = prompts_of(MIXED_LENGTHS, SHAPES[NAME].vocab)
    expected = run(start(False), prompts, SEEDED)
    for is_async in (False, True):
        core = start(is_async, scheduling_policy="priority", **CRAMPED)
        for i, prompt in enumerate(prompts):
            core.add_request(make_request(i, prompt, SEEDED, priority=i % 3))
        assert collect(core, len(prompts)) == expected
        assert num_preemptions(core) > 0


def test_same_outputs_with_threshold_and_without_chunks(start: Any) -> None:
    prompts = prompts_of(MIXED_LENGTHS, SHAPES[NAME].vocab)
    expected = run(start(False), prompts, GREEDY)
    assert run(start(True, long_prefill_token_threshold=5), prompts, GREEDY) == expected
    assert run(start(True, enable_chunked_prefill=False), prompts, GREEDY) == expected


def test_stop_tokens_end_a_request_whose_next_step_runs_already(start: Any) -> None:
    prompts = prompts_of(MIXED_LENGTHS, SHAPES[NAME].vocab)
    plain = run(start(False), prompts, GREEDY)
    stops = tuple({outputs[3][0][0] for outputs in plain.values()})
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, stop_token_ids=stops, min_tokens=2)
    expected = run(start(False), prompts, params)
    assert any(outputs[-1][1] == "stop" and len(outputs) < NUM_OUTPUT for outputs in expected.values())
    core = start(True)
    assert run(core, prompts, params) == expected
    assert run(core, prompts, params) == expected


def test_abort_and_the_same_id_again_while_a_step_runs(start: Any) -> None:
    (prompt, other) = prompts_of([9, 30], SHAPES[NAME].vocab)
    core = start(True)
    expected = run(core, [other], GREEDY)
    for _ in range(3):
        core.add_request(make_request(0, prompt, GREEDY))
        core.step()
        core.step()
        core.abort_requests(["0"])
        assert run(core, [other], GREEDY) == expected
    assert core.reset_prefix_cache()


def test_worker_has_a_thread_of_its_own_in_which_it_is_built_runs_and_ends(start: Any, monkeypatch: Any) -> None:
    core = start(True)
    assert isinstance(core.executor, UniProcExecutor)
    runner, threads = core.executor.worker, []

    def execute_model(scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        threads.append(threading.current_thread().name)
        raise RuntimeError("the model failed")

    monkeypatch.setattr(runner, "execute_model", execute_model)
    core.add_request(make_request(0, [1], GREEDY))
    with pytest.raises(RuntimeError, match="the model failed"):
        core.step()
    core.shutdown()
    assert set(threads) == {"worker_0"}
    assert not any(thread.name.startswith("worker_") for thread in threading.enumerate())
