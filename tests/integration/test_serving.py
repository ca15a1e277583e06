"""The whole stack, as clients see it: the official openai client and curl, through the router and past it."""

import asyncio
import json
import subprocess

import httpx
import openai
import pytest

from kvstrata.stack import Stack
from kvstrata.workload import WorkloadSpec, replay

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
MESSAGES = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Go on."}]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=60, max_retries=0)


@pytest.fixture(params=["router", "engine"])
def url(request: pytest.FixtureRequest, stack: Stack) -> str:
    return stack.url if request.param == "router" else stack.engines[0].url


def test_openai_client_streams_what_it_gets_at_once(url, stack):
    with client_of(url) as client:
        whole = client.chat.completions.create(model=stack.spec.model, messages=MESSAGES, max_tokens=12, temperature=0)
        chunks = list(
            client.chat.completions.create(
                model=stack.spec.model,
                messages=MESSAGES,
                max_tokens=12,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert streamed.strip()
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


def test_openai_client_completes_text(url, stack):
    with client_of(url) as client:
        whole = client.completions.create(model=stack.spec.model, prompt=PROMPT, max_tokens=8, temperature=0)
        stream = client.completions.create(
            model=stack.spec.model, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text


def test_curl_streams_server_sent_events(url, stack):
    body = {"model": stack.spec.model, "messages": MESSAGES, "max_tokens": 4, "stream": True}
    command = ["curl", "-sSN", "--max-time", "60", f"{url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    events = [line for line in result.stdout.splitlines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


def test_models_are_listed(url, stack):
    with client_of(url) as client:
        assert [model.id for model in client.models.list()] == [stack.spec.model]


def test_engine_and_router_report_metrics(stack):
    engine = httpx.get(f"{stack.engines[0].url}/metrics", timeout=30).text
    assert "vllm:prefix_cache_hits" in engine
    assert "vllm:external_prefix_cache_hits" in engine
    assert httpx.get(f"{stack.url}/metrics", timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "no-such-model"}, 404, "no-such-model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 7}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, 400, "4096"),
    ],
)
def test_bad_requests_are_refused_by_name(url, stack, change, status, word):
    body = {"model": stack.spec.model, "messages": MESSAGES, "max_tokens": 4, **change}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == status, response.text
    assert word in response.json()["error"]["message"]


def test_malformed_json_is_refused(url):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/v1/chat/completions", content=b'{"model": ', headers=headers, timeout=30)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_follow_up_turns_land_on_the_pod_that_holds_the_conversation(stack):
    spec = WorkloadSpec(
        num_users=8, num_turns=3, num_system_prompts=2, system_words=100, document_words=0, think_s=1.0, seed=11
    )
    turns = asyncio.run(replay(stack.url, stack.spec.model, spec))
    pods = {(turn.user_id, turn.turn): turn.pod for turn in turns}
    assert len(turns) == 24
    assert set(pods.values()) == {"pod-0", "pod-1"}
    for user in range(8):
        assert len({pods[user, turn] for turn in range(3)}) == 1
    assert all(turn.cached_tokens > 0 for turn in turns if turn.turn > 0)


def test_a_reset_device_cache_is_served_from_the_cpu_tier(stack):
    words = WorkloadSpec(num_users=1, num_turns=1, system_words=1200, document_words=0, think_s=0, seed=5)
    engine = stack.engines[0].url
    cold = asyncio.run(replay(engine, stack.spec.model, words))[0]
    assert cold.cached_tokens == 0
    assert cold.prompt_tokens > 2000
    assert httpx.post(f"{engine}/reset_prefix_cache", timeout=30).status_code == 200
    restored = asyncio.run(replay(engine, stack.spec.model, words))[0]
    block = stack.spec.block_size
    assert restored.external_cached_tokens == restored.cached_tokens == (cold.prompt_tokens - 1) // block * block
    assert restored.text == cold.text
