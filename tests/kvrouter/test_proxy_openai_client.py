"""The official client through the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from tests.kvrouter.conftest import StartProxy
from tests.kvrouter.openai_pod import FakePod

from kvrouter.config import PodConfig


@pytest.fixture
async def client(start_proxy: StartProxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        FakePod("a").serve() as pod,
        start_proxy(PodConfig("a", pod.url)) as proxy,
        openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="k", max_retries=0) as client,
    ):
        yield client


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_chat_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert [chunk.choices[0].delta.content async for chunk in stream] == ["a-0", "a-1", "a-2"]


async def test_completion_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="m", prompt="hi", stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == ["a-0", "a-1", "a-2"]


async def test_chat_and_completion_answer_in_one_piece(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(model="m", messages=MESSAGES)
    assert chat.choices[0].message.content == "a-0 a-1 a-2"
    raw = await client.completions.with_raw_response.create(model="m", prompt=[1, 2, 3])
    assert raw.parse().choices[0].text == "a-0 a-1 a-2"
    assert raw.headers["x-kvstrata-pod"] == "a"


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["m"]


async def test_unknown_model_is_a_not_found_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="served are m"):
        await client.chat.completions.create(model="x", messages=MESSAGES)
