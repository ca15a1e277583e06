"""Where a running proxy sends requests: by KV events from real sockets, and without them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from tests.kvrouter.conftest import RunningProxy, StartProxy
from tests.kvrouter.event_engine import Engine, batch, cleared, stored
from tests.kvrouter.openai_pod import FakePod

from kvrouter.config import PodConfig
from kvrouter.preprocessing.chat_completions import ChatRequest, ModelTokenizer

TOKENS = list(range(1000, 1160))  # ten blocks
TEXT = "the cache of a block is a block of the cache and its prefix " * 12
MESSAGES = [{"role": "user", "content": TEXT}]
TIMEOUT_S = 20.0


@pytest.fixture
async def pods() -> AsyncIterator[list[FakePod]]:
    async with FakePod("a").serve() as a, FakePod("b").serve() as b:
        yield [a, b]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """The event side of the pods."""
    with contextlib.ExitStack() as stack:
        made = [Engine(f"kv@{name}@m") for name in "ab"]
        for engine in made:
            stack.callback(engine.close)
        yield made


def configs(pods: list[FakePod], engines: list[Engine]) -> list[PodConfig]:
    return [
        PodConfig(pod.name, pod.url, "m", engine.endpoint, engine.replay_endpoint)
        for pod, engine in zip(pods, engines, strict=True)
    ]


async def ask(proxy: RunningProxy, path: str = "/v1/completions", **fields: object) -> tuple[str, int]:
    """Return the pod that answered and the tokens it was predicted to have cached."""
    async with proxy.client.post(proxy.url + path, json={"model": "m", **fields}) as response:
        assert response.status == 200, await response.text()
        return response.headers["x-kvstrata-pod"], int(response.headers["x-kvstrata-cached-tokens"])


async def announce(proxy: RunningProxy, engine: Engine, pod: str, payload: bytes) -> None:
    """Publish events and wait until the index has them."""

    def publish() -> None:
        if not engine.history:
            engine.wait_for_subscriber()
        seq = engine.send(payload)
        proxy.server.subscribers.wait_applied(pod, seq, TIMEOUT_S)

    await asyncio.to_thread(publish)


async def test_requests_go_to_the_pod_whose_events_announced_the_prefix(
    start_proxy: StartProxy, pods: list[FakePod], engines: list[Engine], model_tokenizer: ModelTokenizer
) -> None:
    chat_ids = model_tokenizer.encode_chat(ChatRequest(MESSAGES)).tolist()
    text_ids = model_tokenizer.encode_prompt(TEXT).tolist()
    async with start_proxy(*configs(pods, engines), tokenizers={"m": model_tokenizer}) as proxy:
        await announce(proxy, engines[1], "b", batch(stored(range(10), TOKENS)))
        await announce(proxy, engines[0], "a", batch(stored(range(100, 104), text_ids[:64])))
        await announce(proxy, engines[1], "b", batch(stored(range(200, 205), chat_ids[:80])))
        assert await ask(proxy, prompt=[*TOKENS, 1, 2, 3]) == ("b", 160)
        assert await ask(proxy, prompt=TEXT) == ("a", 64)
        assert await ask(proxy, "/v1/chat/completions", messages=MESSAGES) == ("b", 80)
        parts = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]
        pod, cached = await ask(proxy, "/v1/chat/completions", messages=parts)
        assert pod == "b"
        assert cached >= 80  # the same conversation, just sent there
        metrics = await (await proxy.client.get(proxy.url + "/metrics")).text()
    assert 'kvrouter_proxy_predicted_cached_tokens_total{pod="a"} 64.0' in metrics


async def test_last_token_never_counts_as_cached(
    start_proxy: StartProxy, pods: list[FakePod], engines: list[Engine]
) -> None:
    async with start_proxy(*configs(pods, engines), recent_route_ttl=0.0) as proxy:
        await announce(proxy, engines[0], "a", batch(stored(range(10), TOKENS)))
        assert await ask(proxy, prompt=TOKENS) == ("a", 144)
        assert await ask(proxy, prompt=[*TOKENS, 1]) == ("a", 160)


async def test_cleared_cache_and_other_salt_are_not_predicted(
    start_proxy: StartProxy, pods: list[FakePod], engines: list[Engine]
) -> None:
    async with start_proxy(*configs(pods, engines), recent_route_ttl=0.0) as proxy:
        await announce(proxy, engines[0], "a", batch(stored(range(10), TOKENS)))
        assert (await ask(proxy, prompt=TOKENS, cache_salt="s"))[1] == 0
        await announce(proxy, engines[0], "a", batch(cleared()))
        assert (await ask(proxy, prompt=TOKENS))[1] == 0


async def test_blocks_of_a_dead_pod_are_forgotten(
    start_proxy: StartProxy, pods: list[FakePod], engines: list[Engine]
) -> None:
    async with start_proxy(*configs(pods, engines)) as proxy:
        await announce(proxy, engines[0], "a", batch(stored(range(10), TOKENS)))
        assert proxy.server.indexer.get_pod_scores(TOKENS, "m") == {"a": 10.0}
        proxy.server.registry.unreachable(proxy.server.registry["a"])
        proxy.server._background.submit(lambda: None).result(TIMEOUT_S)
        assert proxy.server.indexer.get_pod_scores(TOKENS, "m") == {}
        assert (await ask(proxy, prompt=TOKENS))[0] == "b"


async def test_same_prompt_follows_the_first_before_any_event(start_proxy: StartProxy, pods: list[FakePod]) -> None:
    async with start_proxy(*[PodConfig(pod.name, pod.url, "m") for pod in pods]) as proxy:
        first = asyncio.ensure_future(ask(proxy, prompt=TOKENS, fake={"hang": True}))
        async with asyncio.timeout(TIMEOUT_S):
            done, waiting = await asyncio.wait(
                [asyncio.ensure_future(pod.running.wait()) for pod in pods], return_when=asyncio.FIRST_COMPLETED
            )
        assert len(done) == 1
        for task in waiting:
            task.cancel()
        holder = next(pod.name for pod in pods if pod.bodies)
        assert await ask(proxy, prompt=[*TOKENS, *range(50)]) == (holder, 160)
        assert (await ask(proxy, prompt=list(range(160))))[0] != holder
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_refused_prompt_does_not_count_as_cached(start_proxy: StartProxy, pods: list[FakePod]) -> None:
    async with start_proxy(PodConfig("a", pods[0].url, model="m")) as proxy:
        body = {"model": "m", "prompt": TOKENS, "fake": {"status": 400}}
        async with proxy.client.post(f"{proxy.url}/v1/completions", json=body) as response:
            assert response.status == 400
        assert await ask(proxy, prompt=TOKENS) == ("a", 0)
        assert (await ask(proxy, prompt=TOKENS))[1] > 0
        assert proxy.server.registry["a"].num_running == 0


async def test_conversation_stays_on_its_pod_without_events(
    start_proxy: StartProxy, pods: list[FakePod], model_tokenizer: ModelTokenizer
) -> None:
    configs = [PodConfig(pod.name, pod.url) for pod in pods]
    async with start_proxy(*configs, tokenizers={"m": model_tokenizer}) as proxy:
        homes = set()
        for user in range(4):
            messages = [{"role": "user", "content": f"user {user}: {TEXT}"}]
            home, _ = await ask(proxy, "/v1/chat/completions", messages=messages, stream=True)
            homes.add(home)
            for turn in range(3):
                messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"turn {turn}"}]
                pod, cached = await ask(proxy, "/v1/chat/completions", messages=messages, stream=True)
                assert pod == home
                assert cached > 0
        assert homes == {"a", "b"}


@pytest.mark.parametrize("fields", [{"prompt": TEXT}, {"prompt": [TEXT, TEXT]}, {"prompt": []}, {"prompt": ""}])
async def test_without_a_tokenizer_text_goes_by_load(
    start_proxy: StartProxy, pods: list[FakePod], fields: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    async with start_proxy(*[PodConfig(pod.name, pod.url) for pod in pods]) as proxy:
        seen = {(await ask(proxy, **fields))[0] for _ in range(6)}
    assert seen == {"a", "b"}
    assert sum("no_tokenizer" in record.message for record in caplog.records) <= 1


async def test_conversation_the_template_refuses_is_the_engines_to_judge(
    start_proxy: StartProxy, pods: list[FakePod], model_tokenizer: ModelTokenizer
) -> None:
    configs = [PodConfig(pod.name, pod.url) for pod in pods]
    async with start_proxy(*configs, tokenizers={"m": model_tokenizer}) as proxy:
        assert (await ask(proxy, "/v1/chat/completions", messages=[]))[1] == 0
        metrics = await (await proxy.client.get(proxy.url + "/metrics")).text()
    assert 'kvrouter_proxy_unscored_requests_total{reason="PromptError"} 1.0' in metrics


async def test_pod_learnt_by_its_model_list_is_subscribed_to(
    start_proxy: StartProxy, pods: list[FakePod], engines: list[Engine]
) -> None:
    asked = [replace(config, model=None) for config in configs(pods, engines)]
    async with start_proxy(*asked) as proxy:
        await announce(proxy, engines[0], "a", batch(stored(range(10), TOKENS)))
        assert await ask(proxy, prompt=TOKENS) == ("a", 144)


async def test_bad_event_endpoint_costs_the_scores_of_one_pod_alone(
    start_proxy: StartProxy, pods: list[FakePod], caplog: pytest.LogCaptureFixture
) -> None:
    bad = PodConfig("a", pods[0].url, "m", "tcp://not a host:port")
    async with start_proxy(bad, PodConfig("b", pods[1].url, "m")) as proxy:
        assert {(await ask(proxy, prompt=[number] * 16))[0] for number in range(8)} == {"a", "b"}
    assert any("subscription_failed" in record.message for record in caplog.records)
