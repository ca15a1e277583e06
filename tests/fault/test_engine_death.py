"""An engine is killed under the router: its requests fail over or fail cleanly, and once back it is used again."""

import asyncio
import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path

import aiohttp
import psutil
import pytest

from kvstrata.stack import Stack, StackSpec
from kvstrata.workload import WorkloadSpec, ask, make_conversations

SPEC = WorkloadSpec(num_users=12, num_turns=2, num_system_prompts=12, system_words=60, document_words=0, user_words=20)
DEADLINE_S = 60


@pytest.fixture
def stack(small_model: Path):
    options = ("--num-kv-blocks", "512", "--num-threads", "1", "--max-model-len", "4096")
    with Stack(StackSpec(model=str(small_model), engine_options=options, cpu_cache_gb=0.05)) as running:
        yield running


def kill_engine(stack: Stack, index: int) -> None:
    """kill -9 the front end only: the kernel must take the engine core along."""
    process = psutil.Process(stack.engines[index].process.pid)
    children = process.children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    stack.engines[index].process.wait(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert not alive, f"left behind by a killed engine: {alive}"


async def ask_all(stack: Stack, max_tokens: int, on_first=None, seed: int = SPEC.seed) -> list[object]:
    """Every user's first turn at once; results or exceptions, in user order. Another seed gives other prompts."""

    async def one(session: aiohttp.ClientSession, conversation) -> object:
        messages = [
            {"role": "system", "content": conversation.system_prompt},
            {"role": "user", "content": conversation.user_turns[0]},
        ]
        return await ask(session, stack.url, stack.spec.model, messages, max_tokens)

    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:
        tasks = [
            asyncio.create_task(one(session, conversation))
            for conversation in make_conversations(replace(SPEC, seed=seed))
        ]
        if on_first:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            on_first()
        return await asyncio.gather(*tasks, return_exceptions=True)


def test_requests_of_a_killed_engine_fail_over_or_fail_cleanly(stack):
    before = asyncio.run(ask_all(stack, 4))
    assert {result.pod for result in before} == {"pod-0", "pod-1"}

    during = asyncio.run(ask_all(stack, 64, on_first=lambda: kill_engine(stack, 0)))
    errors = [result for result in during if isinstance(result, BaseException)]
    assert all(isinstance(error, aiohttp.ClientError) for error in errors), errors
    assert any(not isinstance(result, BaseException) for result in during)

    after = asyncio.run(ask_all(stack, 4))
    assert {result.pod for result in after} == {"pod-1"}

    stack.restart_engine(0)

    async def until_used_again() -> None:
        # Prompts that nobody has seen go to whoever is idle; the old ones rightly stay where they are cached.
        async with asyncio.timeout(DEADLINE_S):
            for seed in itertools.count(100):
                if any(result.pod == "pod-0" for result in await ask_all(stack, 4, seed=seed)):
                    return

    asyncio.run(until_used_again())


def test_answers_before_and_after_a_restart_are_the_same(stack):
    def texts(results: list[object]) -> list[str]:
        return [result.text for result in results]

    before = texts(asyncio.run(ask_all(stack, 8)))
    kill_engine(stack, 1)
    assert texts(asyncio.run(ask_all(stack, 8))) == before
    stack.restart_engine(1)
    assert texts(asyncio.run(ask_all(stack, 8))) == before
