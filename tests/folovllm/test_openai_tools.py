"""Tools through the HTTP interface: over a core that repeats the prompt, the last message is the answer."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tests.folovllm.serving_fixtures import fake_server, write_front_end_files

MODEL = "demo"
TEMPLATE = (
    "{%- if show -%}{{ tools | tojson }}{% for m in messages %}{{ '\n' + m | tojson }}{% endfor %}"
    "{%- else -%}{# as in <tool_call></tool_call> #}{{ messages[-1]['content'] }}<|im_end|>{%- endif -%}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with fake_server(write_front_end_files(tmp_path_factory.mktemp("model"), TEMPLATE)) as client:
        yield client


async def ask(client: httpx.AsyncClient, answer: str, **body: Any) -> dict[str, Any]:
    """The choice of a chat whose answer is `answer`, not streamed; streamed it must say the same."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": answer}],
        "tools": [WEATHER, CLOCK],
        **body,
    }
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
    assert without_ids(put_together(streamed)) == without_ids(choice)
    return choice


def put_together(response: httpx.Response) -> dict[str, Any]:
    """The choice of a stream, as clients put it together."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    message: dict[str, Any] = {"role": None, "content": None}
    calls: list[dict[str, Any]] = []
    for line in lines:
        [choice] = json.loads(line)["choices"]
        delta = choice["delta"]
        message["role"] = delta.get("role", message["role"])
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for piece in delta.get("tool_calls", []):
            if "id" in piece:
                assert (piece["index"], piece["type"]) == (len(calls), "function")
                calls.append({"function": {"name": piece["function"]["name"], "arguments": ""}, "type": "function"})
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    return {**choice, "message": message}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [{"function": call["function"], "type": call["type"]} for call in message.get("tool_calls", [])]
    return {
        "content": message["content"],
        "calls": calls,
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
    }


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls", [])
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


async def test_a_call_is_no_text(client: httpx.AsyncClient) -> None:
    choice = await ask(client, ONE)
    assert calls_of(choice) == [("weather", '{"city": "東京"}')]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


async def test_text_comes_before_two_calls(client: httpx.AsyncClient) -> None:
    choice = await ask(client, "Let me see.\n" + TWO)
    assert calls_of(choice) == [("weather", '{"city": "東京"}'), ("clock", "{}")]
    assert choice["message"]["content"] == "Let me see."


async def test_parallel_calls_can_be_refused(client: httpx.AsyncClient) -> None:
    assert [name for name, _ in calls_of(await ask(client, TWO, parallel_tool_calls=False))] == ["weather"]


async def test_an_answer_without_calls_is_text(client: httpx.AsyncClient) -> None:
    choice = await ask(client, "It rains.")
    assert choice["message"] == {"role": "assistant", "content": "It rains."}
    assert choice["finish_reason"] == "stop"


async def test_a_call_that_is_cut_short_says_so(client: httpx.AsyncClient) -> None:
    count = (await client.post("/tokenize", json={"prompt": ONE})).json()["count"]
    choice = await ask(client, ONE, max_tokens=count - 12)
    [(name, arguments)] = calls_of(choice)
    assert (name, choice["finish_reason"]) == ("weather", "length")
    assert '{"city": "東京"}'.startswith(arguments)


async def test_without_tools_nothing_is_parsed(client: httpx.AsyncClient) -> None:
    for body in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = await ask(client, ONE, **body)
        assert (choice["message"]["content"], choice["finish_reason"]) == (ONE, "stop")


async def test_a_named_function_is_called(client: httpx.AsyncClient) -> None:
    choice = await ask(client, '{"city": "Größe"}', tool_choice={"type": "function", "function": {"name": "weather"}})
    assert calls_of(choice) == [("weather", '{"city": "Größe"}')]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


async def test_some_function_is_called(client: httpx.AsyncClient) -> None:
    answer = '[{"name": "weather", "arguments": {"city": "a]"}}, {"name":"clock","arguments":{}}]'
    choice = await ask(client, answer, tool_choice="required")
    assert calls_of(choice) == [("weather", '{"city": "a]"}'), ("clock", "{}")]
    assert choice["finish_reason"] == "tool_calls"


async def test_logprobs_of_a_call_are_complete(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": ONE}], "tools": [WEATHER], "logprobs": True, "stream": True}
    response = await client.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    raw = bytes(b for piece in pieces if piece for entry in piece["content"] for b in entry["bytes"])
    assert raw.decode() == ONE + "<|im_end|>"


async def test_tools_and_earlier_calls_reach_the_template(client: httpx.AsyncClient) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]  # fmt: skip
    body = {"messages": messages, "tools": [WEATHER], "chat_template_kwargs": {"show": True}}
    tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
    text = (await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    tools, user, assistant, tool = map(json.loads, text.splitlines())
    assert tools == [WEATHER]
    assert user == {"role": "user", "content": "weather?"}
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Bonn"}}
    assert tool == messages[2]


@pytest.mark.parametrize(
    ("body", "param", "complaint"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "only allowed with tools"),
        ({"tool_choice": {"function": {"name": "f"}}}, "tool_choice", "none of the tools: ['weather']"),
        ({"tool_choice": "always"}, "tool_choice", "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "Field required"),
        ({"tools": [{"type": "retrieval"}]}, "tools", "function"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "no other choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[0].tool_calls", "not JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "without function.name"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "must not hold 'tools'"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, complaint: str
) -> None:
    messages = [{"role": "user", "content": "x"}]
    response = await client.post("/v1/chat/completions", json={"messages": messages, "tools": [WEATHER], **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert complaint in error["message"]


async def test_a_template_without_tools_refuses_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}
    async with fake_server(write_front_end_files(tmp_path_factory.mktemp("plain"))) as client:
        for choice in ("auto", "required"):
            response = await client.post("/v1/chat/completions", json={**body, "tool_choice": choice})
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "unsupported_parameter"
        body["tool_choice"] = "none"
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
