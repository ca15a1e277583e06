"""A multi-turn chat workload: users who share system prompts and talk for several turns, each turn on top of the last.

The text is documentation that the demo's model has not learnt, so that prompts are ordinary English of a known size;
each turn ends in a question that this model can answer.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvstrata.demo_model import held_out_text

REQUEST_TIMEOUT_S = 120.0
ASKED_ABOUT = (  # noqa: SIM905 - a list would take a line for each
    "str.split str.join str.strip str.replace list.append list.sort list.pop dict.get dict.items dict.update set.add "
    "len print sorted range zip map filter sum max min abs isinstance enumerate any all round open itertools.chain "
    "functools.partial collections.Counter json.dumps os.getcwd math.sqrt random.shuffle time.time copy.deepcopy"
).split()
"""Names of Python that the users ask about."""


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """Size of the workload."""

    num_users: int = 12
    num_turns: int = 4
    num_system_prompts: int = 4
    system_words: int = 700
    """Shared between users."""
    document_words: int = 370
    """What each user brings along in the first turn."""
    user_words: int = 40
    """What each user quotes in each turn, before the question."""
    max_tokens: int = 32
    think_s: float = 1.5
    """Mean time a user thinks between an answer and the next question; exponentially distributed."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one user brings along: a shared system prompt, what to say in each turn, and how long to think before it."""

    user_id: int
    system_prompt: str
    user_turns: tuple[str, ...]
    think_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TurnResult:
    """One answered turn, as the client saw it."""

    user_id: int
    turn: int
    pod: str
    ttft_s: float
    latency_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens the engine did not compute, from whatever source."""
    external_cached_tokens: int
    """The part of `cached_tokens` that came from the engine's KV store."""
    text: str


def make_conversations(spec: WorkloadSpec) -> list[Conversation]:
    """The conversations of a workload; equal specs give equal conversations."""
    rng = random.Random(spec.seed)
    text = held_out_text()
    words = [match.span() for match in re.finditer(r"\S+", text)]

    def passage(num_words: int) -> str:
        first = rng.randrange(len(words) - num_words)
        return text[words[first][0] : words[first + num_words - 1][1]]

    def turn(num_words: int) -> str:
        return f"{passage(num_words)}\n\nWhat does {rng.choice(ASKED_ABOUT)} do?"

    def conversation(user_id: int) -> Conversation:
        words_per_turn = [spec.user_words] * spec.num_turns
        words_per_turn[0] += spec.document_words
        return Conversation(
            user_id=user_id,
            system_prompt=system_prompts[user_id % spec.num_system_prompts],
            user_turns=tuple(turn(num_words) for num_words in words_per_turn),
            think_s=tuple(rng.expovariate(1 / spec.think_s) if spec.think_s else 0.0 for _ in words_per_turn),
        )

    system_prompts = [passage(spec.system_words) for _ in range(spec.num_system_prompts)]
    return [conversation(user_id) for user_id in range(spec.num_users)]


async def replay(
    url: str, model: str, spec: WorkloadSpec, on_turn: Callable[[TurnResult], None] | None = None
) -> list[TurnResult]:
    """Hold all conversations of `spec` at once against an OpenAI endpoint, in a closed loop per user.

    Raises:
        aiohttp.ClientError: a request failed.
    """
    results: list[TurnResult] = []

    async def converse(session: aiohttp.ClientSession, conversation: Conversation) -> None:
        messages = [{"role": "system", "content": conversation.system_prompt}]
        for turn, (text, think_s) in enumerate(zip(conversation.user_turns, conversation.think_s, strict=True)):
            await asyncio.sleep(think_s)
            messages.append({"role": "user", "content": text})
            result = await ask(session, url, model, messages, spec.max_tokens, (conversation.user_id, turn))
            messages.append({"role": "assistant", "content": result.text})
            results.append(result)
            if on_turn:
                on_turn(result)

    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session, asyncio.TaskGroup() as users:
        for conversation in make_conversations(spec):
            users.create_task(converse(session, conversation))
    return results


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    messages: list[dict[str, str]],
    max_tokens: int,
    who: tuple[int, int] = (0, 0),
) -> TurnResult:
    """One streamed greedy chat completion.

    Raises:
        aiohttp.ClientError: the endpoint refused, broke off, or reported an error in the stream.
    """
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise aiohttp.ClientPayloadError(f"the stream ended in an error: {chunk['error']}")
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter()
                pieces.append(chunk["choices"][0]["delta"]["content"])
            usage = chunk.get("usage") or usage
    end = time.perf_counter()
    if not usage:
        raise aiohttp.ClientPayloadError("the stream ended without usage")
    return _turn_result(who, response.headers, (start, first or end, end), usage, "".join(pieces))


def _turn_result(
    who: tuple[int, int],
    headers: Mapping[str, str],
    times: tuple[float, float, float],
    usage: dict[str, Any],
    text: str,
) -> TurnResult:
    start, first, end = times
    details = usage.get("prompt_tokens_details") or {}
    return TurnResult(
        user_id=who[0],
        turn=who[1],
        pod=headers.get("x-kvstrata-pod", ""),
        ttft_s=first - start,
        latency_s=end - start,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
        external_cached_tokens=details.get("external_cached_tokens") or 0,
        text=text,
    )
