"""The HTTP interface over a core that repeats the prompt."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tests.folovllm.serving_fixtures import MAX_MODEL_LEN, UNLUCKY, start_fake_core, write_front_end_files

from folovllm.engine.async_llm import AsyncLLM
from folovllm.entrypoints.openai import middleware
from folovllm.entrypoints.openai.middleware import RequestGate
from folovllm.entrypoints.openai.routes import build_app
from folovllm.entrypoints.openai.serving import OpenAIServing
from folovllm.metrics.stats import EngineMetrics

DEADLINE_S = 60
MODEL = "demo"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_front_end_files(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(directory: Path) -> AsyncIterator[Any]:
    engine = AsyncLLM(start_fake_core(), EngineMetrics(MODEL))  # type: ignore[arg-type]
    await engine.start(directory, False, DEADLINE_S)
    yield build_app(OpenAIServing(engine, MODEL), str(directory))
    await engine.shutdown()


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(RequestGate(app, None))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=DEADLINE_S) as client:
        yield client


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": MODEL, "prompt": "the cache is full", **body})


async def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_completion_and_its_usage(client: httpx.AsyncClient) -> None:
    body = (await complete(client, prompt="one time only", max_tokens=3)).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == MODEL
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert "one time only".startswith(choice["text"])
    usage = body["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "external_cached_tokens": 0}
    again = (await complete(client, prompt="one time only", max_tokens=3)).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


async def test_max_tokens_of_a_completion_is_16_unless_told(client: httpx.AsyncClient) -> None:
    assert (await complete(client)).json()["usage"]["completion_tokens"] == 16
    assert (await complete(client, max_tokens=None)).json()["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("prompt", [[[5, 6], [7, 8, 9]], ["first one", "second"], [[5], [6], [7]]])
async def test_several_prompts_give_a_choice_each(client: httpx.AsyncClient, prompt: Any) -> None:
    alone = [(await complete(client, prompt=p, max_tokens=4)).json()["choices"][0]["text"] for p in prompt]
    body = (await complete(client, prompt=prompt, max_tokens=4)).json()
    assert [choice["text"] for choice in body["choices"]] == alone
    assert body["usage"]["completion_tokens"] == 4 * len(prompt)
    chunks = events(await complete(client, prompt=prompt, max_tokens=4, stream=True))
    streamed = [""] * len(prompt)
    for chunk in chunks:
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == alone


async def test_streamed_text_equals_the_whole(client: httpx.AsyncClient) -> None:
    options = {"prompt": "größe 東京 🎉 STOP here", "max_tokens": 60, "stop": ["STO", "never"], "seed": 4}
    whole = (await complete(client, **options)).json()
    chunks = events(await complete(client, **options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"] == "größe 東京 🎉 "
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-2]["choices"][0]["stop_reason"] == "STO"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_stream_without_usage_has_none(client: httpx.AsyncClient) -> None:
    chunks = events(await complete(client, stream=True, max_tokens=2))
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_chat_answers_and_streams(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "tell me"}, {"type": "text", "text": "more"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    body = {"model": MODEL, "messages": messages, "max_completion_tokens": 8, "ignore_eos": True}
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    assert whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    chunks = events(await client.post("/v1/chat/completions", json={**body, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == message["content"]
    tokens = (await client.post("/tokenize", json={"model": MODEL, "messages": messages})).json()
    assert tokens["count"] == whole["usage"]["prompt_tokens"]


async def test_chat_goes_up_to_the_context_unless_told(client: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "go"}], "ignore_eos": True}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"guided_json": {}}, "guided_json"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(
    client: httpx.AsyncClient, options: dict[str, Any], param: str
) -> None:
    error = await error_of(await complete(client, **options))
    assert (error["param"], error["code"], error["type"]) == (param, "unsupported_parameter", "invalid_request_error")
    assert param in error["message"]


async def test_neutral_and_harmless_parameters_are_accepted(client: httpx.AsyncClient) -> None:
    neutral = {"n": 1, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": []}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "response_format": {"type": "text"}}
    assert (await complete(client, **neutral, **harmless)).status_code == 200


@pytest.mark.parametrize(
    ("options", "param", "complaint"),
    [
        ({"temperatur": 0.1}, "temperatur", "unknown parameter 'temperatur'; did you mean 'temperature'?"),
        ({"temperature": -1}, None, "temperature=-1.0 is not allowed"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"top_p": 0}, None, "top_p=0"),
        ({"max_tokens": 0}, None, "max_tokens=0 is not allowed"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**6}, "max_tokens", "maximum context length is 512 tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, None, "min_tokens=9"),
        ({"stop": [""]}, None, "stop"),
        ({"stop": 5}, "stop", "stop: Input should be a valid string; or: Input should be a valid list"),
        ({"seed": -1}, None, "seed=-1"),
        ({"cache_salt": ""}, "cache_salt", "cache_salt=''"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "Extra inputs are not permitted"),
        ({"prompt": ""}, None, "prompt is empty"),
        ({"prompt": []}, "prompt", "prompt=[]"),
        ({"prompt": [[]]}, None, "prompt is empty"),
        ({"prompt": [1, "a"]}, "prompt", "valid"),
        ({"prompt": {"text": "x"}}, "prompt", "prompt: Input should be a valid string"),
        ({"prompt": [10**9]}, None, "token id 1000000000; it must be from 0 to"),
        ({"prompt": "a b c " * 400}, None, "maximum context length is 512 tokens"),
    ],
)
async def test_bad_values_are_named(
    client: httpx.AsyncClient, options: dict[str, Any], param: str | None, complaint: str
) -> None:
    error = await error_of(await complete(client, **options))
    assert complaint in error["message"]
    assert error["param"] == param


async def test_prompt_too_long_has_openais_code(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        error = await error_of(await complete(client, prompt=[5] * 512, stream=stream))
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ([{"content": "x"}], "messages[0] has no role"),
        ([{"role": "user", "content": 5}], "messages[0].content must be a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'; only 'text'"),
        ("hello", "messages: Input should be a valid list"),
    ],
)
async def test_bad_messages_are_named(client: httpx.AsyncClient, messages: Any, complaint: str) -> None:
    response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert complaint in (await error_of(response))["message"]


async def test_unknown_model_is_answered_with_the_served_one(client: httpx.AsyncClient) -> None:
    error = await error_of(await complete(client, model="gpt-9"), 404)
    assert error["code"] == "model_not_found"
    assert "'gpt-9'" in error["message"]
    assert "'demo'" in error["message"]
    assert (await error_of(await client.get("/v1/models/gpt-9"), 404))["code"] == "model_not_found"
    assert (await complete(client, model=None)).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"", b'{"prompt": "a",}', b"\xff\xfe", b'"text"', b"[1]"])
async def test_malformed_json_is_a_clean_400(client: httpx.AsyncClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    await error_of(await client.post("/v1/completions", content=content, headers=headers))


async def test_malformed_json_has_a_code(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    error = await error_of(await client.post("/v1/completions", content=b'{"model": ', headers=headers))
    assert error["code"] == "invalid_json"


async def test_unknown_paths_and_methods_are_openai_errors(client: httpx.AsyncClient) -> None:
    await error_of(await client.get("/v1/nothing"), 404)
    await error_of(await client.get("/v1/completions"), 405)


async def test_models_lists_the_served_one(client: httpx.AsyncClient) -> None:
    [card] = (await client.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", MAX_MODEL_LEN)
    assert (await client.get(f"/v1/models/{MODEL}")).json() == card


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    text = "東京 <|im_end|> blocks " * 200  # longer than the context: it has a number of tokens all the same
    body = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) > body["max_model_len"] == MAX_MODEL_LEN
    back = await client.post("/detokenize", json={"model": MODEL, "tokens": body["tokens"]})
    assert back.json() == {"prompt": text}
    await error_of(await client.post("/detokenize", json={"tokens": [-1]}))
    await error_of(await client.post("/tokenize", json={}))
    await error_of(await client.post("/tokenize", json={"prompt": "a", "promt": "b"}))


async def test_request_id_is_kept_or_made(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"x-request-id": "mine-7"})).headers["x-request-id"] == "mine-7"
    made = [(await client.get(path)).headers["x-request-id"] for path in ("/health", "/nothing")]
    assert len(set(made)) == 2
    assert len((await client.get("/health", headers={"x-request-id": "x" * 999})).headers["x-request-id"]) == 32


async def test_request_the_engine_gives_up_is_an_error_and_no_answer(client: httpx.AsyncClient) -> None:
    for prompt in (UNLUCKY, [[5, 6], UNLUCKY]):
        error = await error_of(await complete(client, prompt=prompt), 500)
        assert (error["type"], error["code"]) == ("server_error", "generation_failed")
        last = events(await complete(client, prompt=prompt, stream=True))[-1]
        assert last["error"]["code"] == "generation_failed"
    assert (await client.post("/reset_prefix_cache")).status_code == 200


async def test_api_describes_itself(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(paths)
    assert (await client.get("/docs")).status_code == 200


async def test_operations(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    assert "version" in (await client.get("/version")).json()
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "vllm:generation_tokens_total{" in metrics.text
    for query in ("", "?reset_external=true", "?reset_connector=1"):
        assert (await client.post(f"/reset_prefix_cache{query}")).json() == {"success": True}


async def test_reset_forgets_the_cache(client: httpx.AsyncClient) -> None:
    await complete(client)
    await client.post("/reset_prefix_cache")
    details = (await complete(client)).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == 0


async def test_api_key_guards_all_but_the_probes(app: Any) -> None:
    transport = httpx.ASGITransport(RequestGate(app, "secret"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            for path in ("/v1/models", "/docs", "/nothing"):
                error = await error_of(await client.get(path, headers=headers), 401)
                assert error["code"] == "invalid_api_key"
        assert (await client.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_large_bodies_are_refused(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 1000)
    error = await error_of(await complete(client, prompt="x" * 2000), 413)
    assert error["code"] == "body_too_large"

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 600

    headers = {"content-type": "application/json"}
    response = await client.post("/v1/completions", content=pieces(), headers=headers)
    assert response.status_code in (400, 413)
