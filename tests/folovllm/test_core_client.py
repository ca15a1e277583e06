import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from tests.folovllm.serving_fixtures import MAX_MODEL_LEN, POOL_TOKENS, FakeHandle, start_fake_core

from folovllm.engine.core_client import ProcClient
from folovllm.engine.messages import EngineCoreOutputs, EngineCoreRequest
from folovllm.errors import EngineDeadError
from folovllm.sampling_params import SamplingParams

DEADLINE_S = 60


class Front:
    """A ProcClient and all that it reported."""

    def __init__(self, handle: FakeHandle) -> None:
        self.handle = handle
        self.steps: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.death: asyncio.Future[EngineDeadError] = asyncio.get_running_loop().create_future()
        self.client = ProcClient(handle, self.steps.put_nowait, self.death.set_result)  # type: ignore[arg-type]

    async def next_step(self) -> EngineCoreOutputs:
        return await asyncio.wait_for(self.steps.get(), DEADLINE_S)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    front = Front(start_fake_core())
    yield front
    await front.client.shutdown()
    assert not front.handle.process.is_alive()
    assert not os.path.exists(front.handle.directory.name)


def request(number: int, max_tokens: int = 3) -> EngineCoreRequest:
    params = SamplingParams(max_tokens=max_tokens)
    return EngineCoreRequest(request_id=str(number), prompt_token_ids=[7, 8, 9], sampling_params=params)


async def test_request_and_outputs_cross_the_sockets(front: Front) -> None:
    ready = await front.client.wait_ready(DEADLINE_S)
    assert (ready.context_len, ready.pool_tokens) == (MAX_MODEL_LEN, POOL_TOKENS)
    front.client.add_request(request(1))
    tokens, reasons = [], []
    while not any(reasons):
        for output in (await front.next_step()).outputs:
            tokens += output.new_token_ids
            reasons.append(output.finish_reason)
    assert (tokens, reasons) == ([7, 8, 9], [None, None, "length"])


async def test_calls_get_their_own_answers(front: Front) -> None:
    await front.client.wait_ready(DEADLINE_S)
    assert await asyncio.gather(*(front.client.reset_prefix_cache() for _ in range(3))) == [True] * 3
    front.client.add_request(request(1, max_tokens=10**6))
    assert await front.client.reset_prefix_cache() is False
    front.client.abort_requests(["1"])
    assert await front.client.reset_prefix_cache() is True


async def test_killed_core_is_noticed_and_every_use_says_so(front: Front) -> None:
    await front.client.wait_ready(DEADLINE_S)
    assert front.handle.process.pid is not None
    os.kill(front.handle.process.pid, signal.SIGKILL)
    death = await asyncio.wait_for(front.death, DEADLINE_S)
    assert "exit code -9" in str(death)
    with pytest.raises(EngineDeadError, match="exit code -9"):
        front.client.add_request(request(1))
    with pytest.raises(EngineDeadError):
        await front.client.reset_prefix_cache()
    front.client.abort_requests(["1"])  # nothing to do, no error


async def test_call_waiting_for_a_core_that_dies_is_answered(front: Front) -> None:
    await front.client.wait_ready(DEADLINE_S)
    assert front.handle.process.pid is not None
    os.kill(front.handle.process.pid, signal.SIGSTOP)
    call = asyncio.ensure_future(front.client.reset_prefix_cache())
    await asyncio.wait({call}, timeout=0.1)
    os.kill(front.handle.process.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(call, DEADLINE_S)


async def test_core_that_cannot_load_tells_why() -> None:
    front = Front(start_fake_core(death="ModelLoadError: no such layer"))
    with pytest.raises(EngineDeadError, match="no such layer"):
        await front.client.wait_ready(DEADLINE_S)
    await front.client.shutdown()


async def test_core_that_is_not_ready_in_time_is_given_up() -> None:
    front = Front(start_fake_core())
    with pytest.raises(EngineDeadError, match="not ready after 0 s"):
        await front.client.wait_ready(0)
    await front.client.shutdown()
    await front.client.shutdown()
    with pytest.raises(EngineDeadError, match="shutting down"):
        front.client.add_request(request(1))
