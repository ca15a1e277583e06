"""A request through a running proxy to engines on loopback sockets: bytes, headers, retries, errors."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import pytest
from tests.kvrouter.conftest import RunningProxy, StartProxy
from tests.kvrouter.openai_pod import FakePod

from kvrouter.config import PodConfig

COMPLETIONS = "/v1/completions"


def config_of(pod: FakePod) -> PodConfig:
    return PodConfig(pod.name, pod.url, model=pod.model)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def post(proxy: RunningProxy, fake: dict[str, object] | None = None, **fields: object) -> aiohttp.ClientResponse:
    body = {"model": "m", "prompt": "hello", "fake": fake or {}, **fields}
    return await proxy.client.post(proxy.url + COMPLETIONS, json=body)


async def test_stream_is_passed_on_byte_for_byte(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        body = {"model": "m", "prompt": "hello", "stream": True, "fake": {"chunks": 50, "split": True}}
        async with proxy.client.post(pod.url + COMPLETIONS, json=body) as direct:
            expected = await direct.read()
        async with proxy.client.post(proxy.url + COMPLETIONS, json=body) as routed:
            assert await routed.read() == expected
            assert routed.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert routed.headers["X-Engine"] == "fake"
            assert routed.headers["x-kvstrata-pod"] == "a"
            assert routed.headers["x-kvstrata-cached-tokens"] == "0"
        assert pod.raw[0] == pod.raw[1]


async def test_each_event_is_passed_on_before_the_next_one_exists(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        response = await post(proxy, {"chunks": 5, "hang_after": 2}, stream=True)
        got = b""
        async with asyncio.timeout(10):
            while got.count(b"\n\n") < 2:  # the pod is silent from here on
                got += await response.content.readany()
        assert got == pod.event("a-0", False) + pod.event("a-1", False)
        response.close()


async def test_whole_answer_and_status_are_passed_on(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        async with await post(proxy) as response:
            assert response.status == 200
            assert (await response.json())["choices"][0]["text"] == "a-0 a-1 a-2"
            assert response.headers["x-kvstrata-pod"] == "a"
        async with await post(proxy, {"status": 418}) as response:
            assert response.status == 418
            assert await response.json() == {"error": {"message": "a says no"}}


async def test_headers_and_query_reach_the_pod_without_those_of_the_connection(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        headers = {"Authorization": "Bearer k", "X-Request-Id": "7", "TE": "trailers", "Accept-Encoding": "br"}
        body = {"model": "m", "prompt": "hello"}
        async with proxy.client.post(proxy.url + COMPLETIONS + "?x=1", json=body, headers=headers) as response:
            assert response.status == 200
        seen = pod.headers[0]
        assert (seen["Authorization"], seen["X-Request-Id"], seen["Accept-Encoding"]) == ("Bearer k", "7", "identity")
        assert "TE" not in seen
        assert seen["Host"] == f"127.0.0.1:{pod.port}"


async def test_refused_connection_is_retried_on_another_pod_which_then_gets_all(start_proxy: StartProxy) -> None:
    async with (
        FakePod("alive").serve() as alive,
        FakePod("dead").serve() as dead,
        start_proxy(config_of(dead), config_of(alive), policy="round_robin") as proxy,
    ):
        dead_pod = proxy.server.registry["dead"]
        # Its name stays, its port does not answer any more.
        dead_pod.config = PodConfig("dead", f"http://127.0.0.1:{free_port()}", model="m")
        for _ in range(3):
            async with await post(proxy) as response:
                assert response.status == 200
                assert response.headers["x-kvstrata-pod"] == "alive"
        assert dead_pod.state.value == "down"
        metrics = await (await proxy.client.get(proxy.url + "/metrics")).text()
    assert 'kvrouter_proxy_retries_total{pod="dead",reason="unreachable"} 1.0' in metrics
    assert "kvrouter_proxy_failovers_total 1.0" in metrics
    assert 'kvrouter_proxy_requests_total{pod="alive",status="200"} 3.0' in metrics
    assert 'kvrouter_pod_up{pod="dead"} 0.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_connection_closed_before_an_answer_is_tried_elsewhere(start_proxy: StartProxy, stream: bool) -> None:
    async with (
        FakePod("a").serve() as a,
        FakePod("b").serve() as b,
        start_proxy(config_of(a), config_of(b), policy="round_robin") as proxy,
        await post(proxy, {"abort": True}, stream=stream) as response,
    ):
        assert response.status == 502
        error = (await response.json())["error"]
    assert error["code"] == "pod_failed"
    assert "closed the connection" in error["message"]
    assert len(a.bodies) + len(b.bodies) == 3  # both once, and one of them again: the connection may have been stale
    assert a.bodies
    assert b.bodies


async def test_status_503_is_tried_elsewhere_and_passed_on_when_nobody_is_left(start_proxy: StartProxy) -> None:
    async with (
        FakePod("a").serve() as a,
        FakePod("b").serve() as b,
        start_proxy(config_of(a), config_of(b)) as proxy,
        await post(proxy, {"status": 503}) as response,
    ):
        assert response.status == 503
        assert "says no" in (await response.json())["error"]["message"]
    assert (len(a.bodies), len(b.bodies)) == (1, 1)


async def test_client_that_leaves_cancels_the_pods_work(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        for fake, stream in (({"hang": True}, False), ({"hang": True}, True), ({"hang_after": 1}, True)):
            pod.running.clear()
            pod.cancelled.clear()
            request = asyncio.ensure_future(post(proxy, fake, stream=stream))
            async with asyncio.timeout(10):
                await pod.running.wait()
                if "hang_after" in fake:
                    (await request).close()
                else:
                    request.cancel()
                    await asyncio.gather(request, return_exceptions=True)
                await pod.cancelled.wait()
        registered = proxy.server.registry["a"]
        assert (registered.num_running, registered.queued_prefill_tokens) == (0, 0)
        assert registered.state.value == "up"


async def test_load_is_counted_while_a_request_runs(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        registered = proxy.server.registry["a"]
        waiting = asyncio.ensure_future(post(proxy, {"hang": True}, prompt=list(range(100))))
        async with asyncio.timeout(10):
            await pod.running.wait()
            assert (registered.num_prefills, registered.num_decodes, registered.queued_prefill_tokens) == (1, 0, 100)
            streaming = await post(proxy, {"hang_after": 1}, stream=True, prompt=list(range(40)))
            await streaming.content.readany()
            assert (registered.num_prefills, registered.num_decodes, registered.queued_prefill_tokens) == (1, 1, 100)
            waiting.cancel()
            streaming.close()


async def test_silent_pod_is_given_up_at_the_deadline(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod), idle_timeout=0.2) as proxy:
        async with await post(proxy, {"hang": True}) as response:
            assert response.status == 504
            assert "did not answer in time" in (await response.json())["error"]["message"]
        async with await post(proxy, {"hang_after": 1}, stream=True) as response:
            events = (await response.read()).split(b"\n\n")
        assert events[0] + b"\n\n" == pod.event("a-0", False)
        assert "fell silent" in json.loads(events[1].removeprefix(b"data: "))["error"]["message"]
        assert len(pod.bodies) == 2


async def test_errors_in_a_row_open_the_breaker_and_a_trial_closes_it(start_proxy: StartProxy) -> None:
    async with (
        FakePod("a").serve() as pod,
        start_proxy(config_of(pod), breaker_failures=2, breaker_cooldown=0.05) as proxy,
    ):
        for _ in range(2):
            async with await post(proxy, {"status": 500}) as response:
                assert response.status == 500
        assert proxy.server.registry["a"].state.value == "open"
        async with await post(proxy) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["code"] == "no_healthy_pod"
        async with asyncio.timeout(10):
            status = 503
            while status != 200:
                async with await post(proxy) as response:
                    status = response.status
        assert proxy.server.registry["a"].state.value == "up"


async def test_both_connections_send_without_delay(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod, start_proxy(config_of(pod)) as proxy:
        response = await post(proxy, {"hang_after": 1}, stream=True)
        runner, session = proxy.server._runner, proxy.server._session
        assert runner is not None
        assert runner.server is not None
        assert session is not None
        server_side = [connection.transport for connection in runner.server.connections]
        assert session.connector is not None
        pod_side = [protocol.transport for protocol in session.connector._acquired]
        assert len(server_side) == 1
        assert len(pod_side) == 1
        for transport in (*server_side, *pod_side):
            assert transport is not None
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        response.close()
