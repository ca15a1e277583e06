"""Several choices, log-probabilities, echo and forms of the answer, over a core that repeats the prompt."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tests.folovllm.serving_fixtures import fake_server, write_front_end_files

MODEL = "demo"
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with fake_server(write_front_end_files(tmp_path_factory.mktemp("model"))) as client:
        yield client


async def complete(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/v1/completions", json={"model": MODEL, "max_tokens": 6, **body})
    assert response.status_code == 200, response.text
    return read(response)


async def chat(client: httpx.AsyncClient, **body: Any) -> Any:
    messages = [{"role": "user", "content": "größe 東京 🎉"}]
    options = {"model": MODEL, "messages": messages, "max_tokens": 40, "ignore_eos": True}
    response = await client.post("/v1/chat/completions", json={**options, **body})
    assert response.status_code == 200, response.text
    return read(response)


def read(response: httpx.Response) -> Any:
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def refusal(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    source = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = await client.post(path, json={**source, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def tokens_of(client: httpx.AsyncClient, text: str) -> tuple[list[int], list[str]]:
    ids = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
    strings = [(await client.post("/detokenize", json={"tokens": [i]})).json()["prompt"] for i in ids]
    return ids, strings


async def test_n_choices_of_each_prompt_in_their_order(client: httpx.AsyncClient) -> None:
    prompts = ["the cache is full", "when no block is free"]
    whole = await complete(client, prompt=prompts, n=3)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    texts = [choice["text"] for choice in whole["choices"]]
    assert [text[:3] for text in texts] == ["the"] * 3 + ["whe"] * 3
    assert len(set(texts)) == 2
    lengths = [len((await tokens_of(client, prompt))[0]) for prompt in prompts]
    assert whole["usage"]["prompt_tokens"] == sum(lengths)
    assert whole["usage"]["completion_tokens"] == 36
    chunks = await complete(client, prompt=prompts, n=3, stream=True)
    streamed = [""] * 6
    for chunk in chunks:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


async def test_n_answers_of_a_chat_stream_each_with_its_role(client: httpx.AsyncClient) -> None:
    whole = await chat(client, n=2)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chat(client, n=2, stream=True, stream_options=options)
    assert chunks.pop()["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"]["content"] for c in mine) == whole["choices"][index]["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 80


async def test_logprobs_of_a_completion(client: httpx.AsyncClient) -> None:
    ids, strings = await tokens_of(client, "größe 東京")
    likely = [(await client.post("/detokenize", json={"tokens": [i]})).json()["prompt"] for i in (20, 21)]
    options = {"prompt": ids, "max_tokens": len(ids), "logprobs": 2}
    [choice] = (await complete(client, **options))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == strings
    assert logprobs["token_logprobs"] == [-i / 1000 for i in ids]
    assert logprobs["text_offset"] == [sum(map(len, strings[:k])) for k in range(len(ids))]
    assert logprobs["top_logprobs"][0] == {likely[0]: -0.002, likely[1]: -0.0021, strings[0]: -ids[0] / 1000}
    merged: dict[str, list[Any]] = {name: [] for name in logprobs}
    for chunk in await complete(client, **options, stream=True):
        for name, values in chunk["choices"][0]["logprobs"].items():
            merged[name] += values
    assert merged == logprobs


async def test_logprobs_zero_tells_the_chosen_token_alone(client: httpx.AsyncClient) -> None:
    [choice] = (await complete(client, prompt=[40, 41], max_tokens=2, logprobs=0))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.04, -0.041]
    assert [list(top.values()) for top in choice["logprobs"]["top_logprobs"]] == [[-0.04], [-0.041]]


@pytest.mark.parametrize("stop", [None, ["東京 is", "never"]])
async def test_logprobs_of_a_chat_stream_as_they_are(client: httpx.AsyncClient, stop: Any) -> None:
    [choice] = (await chat(client, logprobs=True, top_logprobs=1, stop=stop))["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 40
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in content)
    assert choice["message"]["content"].startswith("user\ngröße 東京 🎉")
    assert "user\ngröße 東京 🎉" in bytes(b for entry in content for b in entry["bytes"]).decode(errors="replace")
    assert {entry["top_logprobs"][0]["logprob"] for entry in content} == {-0.002}
    chunks = await chat(client, logprobs=True, top_logprobs=1, stop=stop, stream=True)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == content


async def test_chat_logprobs_need_the_switch(client: httpx.AsyncClient) -> None:
    path = "/v1/chat/completions"
    assert (await refusal(client, path, top_logprobs=2))["param"] == "top_logprobs"
    assert "from 0 to 20" in (await refusal(client, path, logprobs=True, top_logprobs=21))["message"]
    assert (await chat(client))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", ["größe and façade", [50, 51, 52]])
@pytest.mark.parametrize("n", [1, 3])
async def test_echo_begins_with_the_prompt(client: httpx.AsyncClient, prompt: Any, n: int) -> None:
    ids, text = prompt, prompt
    if isinstance(prompt, str):
        ids = (await tokens_of(client, prompt))[0]
    else:
        text = (await client.post("/detokenize", json={"tokens": ids})).json()["prompt"]
    options = {"prompt": prompt, "n": n, "echo": True, "logprobs": 1, "max_tokens": 2}
    whole = await complete(client, **options)
    for choice in whole["choices"]:
        assert choice["text"].startswith(text)
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [None, *[-i / 1000 for i in [*ids[1:], *(ids * 2)[:2]]]]
        assert logprobs["top_logprobs"][0] is None
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + 2
    streamed: list[list[Any]] = [[] for _ in range(n)]
    for chunk in await complete(client, **options, stream=True):
        [choice] = chunk["choices"]
        streamed[choice["index"]].append(choice)
    for choice, pieces in zip(whole["choices"], streamed, strict=True):
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values


async def test_echo_of_no_tokens_is_the_prompt_alone(client: httpx.AsyncClient) -> None:
    options = {"prompt": "the cache is full", "echo": True, "max_tokens": 0, "logprobs": 1}
    whole = await complete(client, **options)
    [choice] = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the cache is full", "length")
    assert len(choice["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"] == whole["usage"]["total_tokens"]
    assert (await complete(client, **options, stream=True))[0]["choices"][0]["text"] == "the cache is full"
    assert "max_tokens=0" in (await refusal(client, max_tokens=0))["message"]


async def test_prompt_logprobs_of_both_endpoints(client: httpx.AsyncClient) -> None:
    [choice] = (await complete(client, prompt=[40, 41], prompt_logprobs=1))["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert {i: (p["logprob"], p["rank"]) for i, p in second.items()} == {"41": (-0.041, 3), "20": (-0.002, 1)}
    answer = await chat(client, prompt_logprobs=0)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in await chat(client)
    assert (await refusal(client, prompt_logprobs=1, stream=True))["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"n": 0}, "n=0 is not allowed"),
        ({"n": 600, "prompt": ["a", "b"]}, "at most 1024 choices"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "biases from -100 to 100"),
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"min_p": 2}, "min_p=2"),
        ({"priority": 3}, "priority=3 is not possible"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "no json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "regexp"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "cannot be used together"),
    ],
)
async def test_bad_values_are_named(client: httpx.AsyncClient, options: dict[str, Any], complaint: str) -> None:
    assert complaint in (await refusal(client, **options))["message"]


async def test_all_sampling_options_are_taken(client: httpx.AsyncClient) -> None:
    options = {
        "n": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "seed": 3,
        "frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_tokens": 1, "bad_words": ["evil"],
        "logit_bias": {"5": 1}, "stop_token_ids": [7], "ignore_eos": True, "skip_special_tokens": False,
        "include_stop_str_in_output": True, "cache_salt": "a", "priority": 0, "stop": ["zzz"],
    }  # fmt: skip
    assert (await complete(client, prompt="the cache", **options))["choices"]
    assert (await complete(client, prompt="the cache", structured_outputs={"choice": ["a", "b"]}))["choices"]
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    assert (await chat(client, response_format={"type": "json_schema", "json_schema": schema}))["choices"]


async def test_final_message_is_continued(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The cache is "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
    prompt = (await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe cache is "
    answer = await chat(client, **body, max_tokens=4)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    error = await refusal(client, "/v1/chat/completions", continue_final_message=True)
    assert error["param"] == "continue_final_message"
