"""Several sequences per prompt through the asynchronous engine: they arrive together and leave together."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.folovllm.serving_fixtures import start_fake_core, write_front_end_files

from folovllm.engine import async_llm
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.core_client import EngineOverloadedError
from folovllm.engine.messages import EngineCoreRequest
from folovllm.engine.parallel_sampling import fan_out
from folovllm.errors import InvalidRequestError
from folovllm.metrics.stats import EngineMetrics
from folovllm.sampling_params import SamplingParams

DEADLINE_S = 60
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True, n=3)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncLLM]:
    """An engine whose model repeats its prompt."""
    engine = AsyncLLM(start_fake_core(), EngineMetrics("demo"))  # type: ignore[arg-type]
    await engine.start(write_front_end_files(tmp_path), False, DEADLINE_S)
    yield engine
    await engine.shutdown()


def make_request(**options: object) -> EngineCoreRequest:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    return EngineCoreRequest(request_id="r", prompt_token_ids=[1, 2], sampling_params=params, priority=4)


def test_one_sequence_is_the_request_itself() -> None:
    request = make_request()
    assert fan_out(request) == [request]


def test_children_differ_in_name_and_seed_and_the_first_alone_reports_the_prompt() -> None:
    children = fan_out(make_request(n=3, seed=7, prompt_logprobs=2, logprobs=1))
    assert [child.request_id for child in children] == ["0_r", "1_r", "2_r"]
    params = [child.sampling_params for child in children]
    assert [(p.n, p.seed, p.prompt_logprobs, p.logprobs) for p in params] == [
        (1, 7, 2, 1),
        (1, 8, None, 1),
        (1, 9, None, 1),
    ]
    assert {child.priority for child in children} == {4}
    assert [child.sampling_params.seed for child in fan_out(make_request(n=2, seed=2**63 - 1))] == [2**63 - 1, 0]
    assert [child.sampling_params.seed for child in fan_out(make_request(n=2))] == [None, None]


async def test_all_sequences_grow_in_one_output(engine: AsyncLLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, n=3)
    states = [state async for state in engine.generate("🎉 and 東京", params, request_id="mine")]
    assert {state.request_id for state in states} == {"mine"}
    assert [state.finished for state in states] == [False] * (len(states) - 1) + [True]
    final = states[-1]
    assert [(o.index, len(o.token_ids), o.finish_reason) for o in final.outputs] == [
        (i, 12, "length") for i in range(3)
    ]
    assert len({o.text for o in final.outputs}) == 1
    assert final.metrics.first_token_time is not None
    assert engine.num_requests == 0


async def test_a_cancelled_caller_aborts_all_sequences(engine: AsyncLLM) -> None:
    async def consume() -> None:
        async for _ in engine.generate([5, 6, 7], ENDLESS):
            started.set()

    started = asyncio.Event()
    caller = asyncio.create_task(consume())
    await asyncio.wait_for(started.wait(), DEADLINE_S)
    assert engine.num_requests == 3
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert engine.num_requests == 0
    async with asyncio.timeout(DEADLINE_S):
        while not await engine.reset_prefix_cache():  # refused while the core has work
            pass


async def test_what_does_not_fit_is_not_begun(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "MAX_REQUESTS_IN_FLIGHT", 2)
    with pytest.raises(EngineOverloadedError):
        await anext(engine.generate([5, 6, 7], ENDLESS))
    assert engine.num_requests == 0


async def test_a_stream_is_of_one_sequence(engine: AsyncLLM) -> None:
    request = engine.processor.make_request([5, 6, 7], ENDLESS)
    with pytest.raises(InvalidRequestError, match="n=3 is not possible in one stream"):
        engine.open(request)
