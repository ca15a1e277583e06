"""Engines in processes of their own that are killed under the proxy, and started again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import openai
import pytest
from tests.kvrouter.conftest import RunningProxy, StartProxy
from tests.kvrouter.openai_pod import PodProcess, pod_process

from kvrouter.config import PodConfig
from kvrouter.proxy.pods import Pod, PodState

TIMEOUT_S = 30.0
URL = "/v1/completions"


def config_of(pod: PodProcess) -> PodConfig:
    return PodConfig(pod.name, pod.url, model="m")


def body(fake: dict[str, object], **fields: object) -> dict[str, object]:
    return {"model": "m", "prompt": "hello", "fake": fake, **fields}


async def until(proxy: RunningProxy, is_so: Callable[[Pod], bool], name: str = "a") -> None:
    """Ask the proxy how it is until it knows of the pod what is so."""
    async with asyncio.timeout(TIMEOUT_S):
        while not is_so(proxy.server.registry[name]):
            async with proxy.client.get(proxy.url + "/health") as response:
                await response.read()


@pytest.mark.parametrize("tear", [False, True])
async def test_pod_killed_mid_stream_ends_the_stream_with_one_error_event(start_proxy: StartProxy, tear: bool) -> None:
    with pod_process("a") as pod:
        async with start_proxy(config_of(pod)) as proxy, asyncio.timeout(TIMEOUT_S):
            request = body({"chunks": 9, "hang_after": 2, "tear": tear}, stream=True)
            async with proxy.client.post(proxy.url + URL, json=request) as response:
                got = b""
                while got.count(b"\n\n") < 2:
                    got += await response.content.readany()
                pod.kill()
                got += await response.read()
            *events, error, end = got.split(b"\n\n")
            assert end == b""
            assert [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events] == [
                "a-0",
                "a-1",
            ]
            message = json.loads(error.removeprefix(b"data: "))["error"]["message"]
            assert message == "pod a broke off in the middle of its answer"
            metrics = await (await proxy.client.get(proxy.url + "/metrics")).text()
            assert 'kvrouter_proxy_broken_streams_total{pod="a"} 1.0' in metrics


async def test_openai_client_sees_the_broken_stream_as_an_api_error(start_proxy: StartProxy) -> None:
    with pod_process("a") as pod:
        async with (
            start_proxy(config_of(pod)) as proxy,
            asyncio.timeout(TIMEOUT_S),
            openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="k", max_retries=0) as client,
        ):
            stream = await client.completions.create(
                model="m", prompt="hi", stream=True, extra_body={"fake": {"chunks": 3, "hang_after": 1}}
            )
            assert (await anext(stream)).choices[0].text == "a-0"
            pod.kill()
            with pytest.raises(openai.APIError, match="broke off"):
                await anext(stream)


async def test_requests_of_a_killed_pod_are_answered_by_the_other(start_proxy: StartProxy) -> None:
    with pod_process("a") as a, pod_process("b") as b:
        pods = (config_of(a), config_of(b))
        async with start_proxy(*pods, policy="round_robin") as proxy, asyncio.timeout(TIMEOUT_S):

            async def ask(number: int) -> str:
                request = body({"chunks": 400}, stream=number % 2 == 0)
                async with proxy.client.post(proxy.url + URL, json=request) as response:
                    assert response.status == 200
                    text = await response.text()
                    if "error" in text:
                        return "broken"  # its answer had begun
                    assert text.endswith("[DONE]\n\n") or number % 2
                    return response.headers["x-kvstrata-pod"]

            requests = [asyncio.ensure_future(ask(number)) for number in range(40)]
            await requests[0]
            a.kill()
            answers = await asyncio.gather(*requests)
            assert answers.count("b") >= 20
            for number in range(4):
                assert await ask(number) == "b"
            assert proxy.server.registry["a"].state.value == "down"


async def test_killed_pod_is_used_again_after_its_restart_on_the_same_port(start_proxy: StartProxy) -> None:
    with pod_process("a") as a, pod_process("b") as b:
        async with start_proxy(config_of(a), config_of(b), policy="round_robin", health_interval=0.05) as proxy:
            a.kill()
            await until(proxy, lambda pod: pod.state is PodState.DOWN)
            with pod_process("a", a.port):
                await until(proxy, lambda pod: pod.state is PodState.UP)
                seen = set()
                for _ in range(4):
                    async with proxy.client.post(proxy.url + URL, json=body({})) as response:
                        assert response.status == 200
                        seen.add((await response.json())["id"])
                assert seen == {"a-whole", "b-whole"}


async def test_answer_in_one_piece_is_fetched_from_another_pod_when_its_pod_is_killed(start_proxy: StartProxy) -> None:
    with pod_process("a") as a, pod_process("b") as b:
        async with start_proxy(config_of(a), policy="round_robin") as alone, asyncio.timeout(TIMEOUT_S):
            request = asyncio.ensure_future(alone.client.post(alone.url + URL, json=body({"hang": True})))
            await until(alone, lambda pod: pod.num_prefills > 0)
            a.kill()
            response = await request
            assert response.status == 502
            assert "pod a" in (await response.json())["error"]["message"]
        async with start_proxy(config_of(a), config_of(b)) as proxy, asyncio.timeout(TIMEOUT_S):
            proxy.server.registry.health_ok(proxy.server.registry["a"])  # as it looks just after the kill
            for _ in range(4):
                async with proxy.client.post(proxy.url + URL, json=body({})) as response:
                    assert response.headers["x-kvstrata-pod"] == "b"


async def test_health_check_that_fails_itself_counts_as_late_and_goes_on(
    start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(pod: Pod) -> None:
        raise ValueError("bug")

    with pod_process("a") as pod:
        async with start_proxy(config_of(pod), health_interval=0.01) as proxy:
            with monkeypatch.context() as patch:
                patch.setattr(proxy.server._health, "_check", broken)
                await until(proxy, lambda pod: pod.state is PodState.DOWN)
            await until(proxy, lambda pod: pod.state is PodState.UP)
    assert "health_check_failed" in caplog.text
