import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.folovllm.serving_fixtures import FakeHandle, start_fake_core, write_front_end_files

from folovllm.engine import async_llm
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.core_client import EngineOverloadedError
from folovllm.errors import EngineDeadError, InvalidRequestError, ModelLoadError
from folovllm.metrics.stats import EngineMetrics
from folovllm.sampling_params import SamplingParams

DEADLINE_S = 60
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_front_end_files(tmp_path_factory.mktemp("model"))


async def start(handle: FakeHandle, directory: Path) -> AsyncLLM:
    engine = AsyncLLM(handle, EngineMetrics("demo"))  # type: ignore[arg-type]
    await engine.start(directory, False, DEADLINE_S)
    return engine


@pytest.fixture
async def engine(directory: Path) -> AsyncIterator[AsyncLLM]:
    engine = await start(start_fake_core(), directory)
    yield engine
    await engine.shutdown()


async def idle(engine: AsyncLLM) -> None:
    """Return when the core has nothing left to do: only then can its prefix cache be reset."""
    async with asyncio.timeout(DEADLINE_S):
        while not await engine.reset_prefix_cache():
            pass


async def test_deltas_add_up_to_the_states(engine: AsyncLLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    states = [state async for state in engine.generate("🎉 and 東京", params)]
    final = states[-1].outputs[0]
    request = engine.processor.make_request(engine.processor.tokenize("🎉 and 東京"), params)
    with engine.open(request) as stream:
        deltas = [delta async for delta in stream]
    assert "".join(delta.text for delta in deltas) == final.text
    assert [i for delta in deltas for i in delta.token_ids] == final.token_ids
    assert (len(final.token_ids), final.finish_reason) == (12, "length")
    assert engine.num_requests == 0


async def test_requests_run_side_by_side(engine: AsyncLLM) -> None:
    async def run(text: str) -> str:
        return [state async for state in engine.generate(text, SamplingParams(max_tokens=20))][-1].outputs[0].text

    texts = [f"prompt number {i} of twenty " for i in range(20)]
    answers = await asyncio.gather(*map(run, texts))
    assert all((text * 3).startswith(answer) for text, answer in zip(texts, answers, strict=True))


async def test_slow_consumer_gets_one_merged_delta(engine: AsyncLLM) -> None:
    request = engine.processor.make_request([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True))
    with engine.open(request) as stream:
        async with asyncio.timeout(DEADLINE_S):
            while not stream.state.finished:  # the caller does something else
                await engine.reset_prefix_cache()
        delta = await anext(stream)
        assert delta.token_ids == [5, 6, 7] * 16 + [5, 6]
        assert delta.finish_reason == "length"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_cancelled_caller_aborts_in_the_core(engine: AsyncLLM) -> None:
    async def consume() -> None:
        async for _ in engine.generate([5, 6, 7], ENDLESS):
            started.set()

    started = asyncio.Event()
    caller = asyncio.create_task(consume())
    await asyncio.wait_for(started.wait(), DEADLINE_S)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert engine.num_requests == 0
    await idle(engine)
    assert b'finished_reason="abort",model_name="demo"} 1.0' in engine.metrics.render()


async def test_stop_string_aborts_in_the_core(engine: AsyncLLM) -> None:
    params = SamplingParams(max_tokens=400, stop=("STOP",))
    states = [state async for state in engine.generate("one STOP two", params)]
    assert states[-1].outputs[0].text == "one "
    assert states[-1].outputs[0].stop_reason == "STOP"
    await idle(engine)


async def test_death_of_the_core_reaches_every_caller(directory: Path) -> None:
    handle = start_fake_core()
    engine = await start(handle, directory)

    async def consume(number: int) -> None:
        async for _ in engine.generate([5, 6, number], ENDLESS):
            started[number].set()

    started = [asyncio.Event() for _ in range(12)]  # more than the core runs at once: some of them wait
    callers = [asyncio.create_task(consume(i)) for i in range(12)]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started[:8])), DEADLINE_S)
    assert handle.process.pid is not None
    os.kill(handle.process.pid, signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), DEADLINE_S)
    assert all(isinstance(result, EngineDeadError) for result in results)
    with pytest.raises(EngineDeadError, match="exit code -9"):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await anext(engine.generate([5], ENDLESS))
    assert engine.num_requests == 0
    await engine.shutdown()


async def test_core_that_hangs_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "STALL_TIMEOUT_S", 0.2)
    handle = start_fake_core()
    engine = await start(handle, directory)
    assert handle.process.pid is not None
    os.kill(handle.process.pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match="silent for"):
        async for _ in engine.generate([5, 6, 7], ENDLESS):
            pass
    await engine.shutdown()


async def test_shutdown_answers_whoever_waits(directory: Path) -> None:
    engine = await start(start_fake_core(), directory)
    request = engine.processor.make_request([5, 6, 7], ENDLESS)
    stream = engine.open(request)
    await anext(stream)
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="shutting down"):
        async for _ in stream:
            pass


async def test_requests_in_flight_are_bounded(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "MAX_REQUESTS_IN_FLIGHT", 1)
    first, second = (engine.processor.make_request([5], ENDLESS) for _ in range(2))
    with engine.open(first), pytest.raises(EngineOverloadedError, match="1 requests are in flight"):
        engine.open(second)
    engine.open(second).close()


async def test_long_prompts_are_tokenised_like_short_ones(engine: AsyncLLM) -> None:
    text = "the same words " * 1000
    assert await engine.encode(text) == engine.processor.require_tokenizer().encode(text)
    with pytest.raises(InvalidRequestError, match="at most 511 fit"):
        await engine.tokenize(text)


async def test_model_that_cannot_be_loaded_is_reported_with_the_cores_words(directory: Path) -> None:
    engine = AsyncLLM(start_fake_core(death="no layer 7"), EngineMetrics("demo"))  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="no layer 7"):
        await engine.start(directory, False, DEADLINE_S)
    await engine.shutdown()
