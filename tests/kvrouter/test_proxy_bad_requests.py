"""Every request the proxy cannot serve gets one clear error in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import pytest
from tests.kvrouter.conftest import RunningProxy, StartProxy
from tests.kvrouter.openai_pod import FakePod

from kvrouter.config import PodConfig

POD = PodConfig("a", "http://127.0.0.1:9", model="m")  # never reached: port 9 refuses


async def error_of(response: aiohttp.ClientResponse) -> dict[str, object]:
    document = await response.json()
    assert response.content_type == "application/json"
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]


async def send(proxy: RunningProxy, data: bytes, path: str = "/v1/completions") -> aiohttp.ClientResponse:
    return await proxy.client.post(proxy.url + path, data=data, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("path", "data", "words"),
    [
        ("/v1/completions", b'{"model": "m", "prompt": "a"', ["not valid JSON"]),
        ("/v1/completions", b"", ["not valid JSON"]),
        ("/v1/completions", b"\xff\xfe", ["not valid JSON"]),
        ("/v1/completions", b'{"model": "m", "prompt": "\\ud800"}', ["not valid JSON"]),
        ("/v1/completions", b"[]", ["object"]),
        ("/v1/completions", b'{"model": "m"}', ["prompt"]),
        ("/v1/completions", b'{"model": "m", "prompt": 5}', ["prompt"]),
        ("/v1/completions", b'{"model": "m", "prompt": [1, "a"]}', ["prompt"]),
        ("/v1/completions", b'{"model": "m", "prompt": [1, -1]}', ["0..4294967295"]),
        ("/v1/completions", b'{"model": "m", "prompt": [1, 4294967296]}', ["0..4294967295"]),
        ("/v1/completions", b'{"model": 7, "prompt": "a"}', ["model"]),
        ("/v1/chat/completions", b'{"model": "m"}', ["messages"]),
        ("/v1/chat/completions", b'{"model": "m", "messages": "hi"}', ["messages"]),
        ("/v1/chat/completions", b'{"model": "m", "messages": ["hi"]}', ["messages"]),
    ],
)
async def test_malformed_body_is_400(start_proxy: StartProxy, path: str, data: bytes, words: list[str]) -> None:
    async with start_proxy(POD) as proxy, await send(proxy, data, path) as response:
        assert response.status == 400
        error = await error_of(response)
        assert error["type"] == "invalid_request_error"
        assert all(word in str(error["message"]) for word in words)


async def test_error_names_the_parameter(start_proxy: StartProxy) -> None:
    async with start_proxy(POD) as proxy:
        async with await send(proxy, b'{"model": "m", "prompt": [1, {}]}') as response:
            assert (await error_of(response))["param"] == "prompt"
        async with await send(proxy, b'{"model": "m"}') as response:
            assert (await error_of(response))["param"] == "prompt"


async def test_unknown_model_is_404_with_the_list(start_proxy: StartProxy) -> None:
    other = PodConfig("b", "http://127.0.0.1:9", model="n")
    async with start_proxy(POD, other) as proxy, await send(proxy, b'{"model": "x", "prompt": "a"}') as response:
        assert response.status == 404
        error = await error_of(response)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        assert "served are m, n" in str(error["message"])


async def test_request_without_a_model_gets_the_only_one(start_proxy: StartProxy) -> None:
    async with FakePod("a").serve() as pod:
        async with start_proxy(PodConfig("a", pod.url)) as proxy, await send(proxy, b'{"prompt": "a"}') as response:
            assert response.status == 200
        other = PodConfig("b", "http://127.0.0.1:9", model="n")
        async with (
            start_proxy(PodConfig("a", pod.url), other) as proxy,
            await send(proxy, b'{"prompt": "a"}') as response,
        ):
            assert response.status == 400
            assert "model is required" in str((await error_of(response))["message"])


async def test_no_healthy_pod_is_503(start_proxy: StartProxy) -> None:
    async with start_proxy(POD) as proxy:
        async with await send(proxy, b'{"model": "m", "prompt": "a"}') as response:
            assert response.status == 503
            assert (await error_of(response))["code"] == "no_healthy_pod"
            assert response.headers["Retry-After"] == "1"
        async with proxy.client.get(proxy.url + "/health") as response:
            assert response.status == 503
            assert (await response.json())["pods"] == {"a": "down"}


async def test_more_requests_than_allowed_are_503_until_one_ends(start_proxy: StartProxy) -> None:
    streaming = b'{"model": "m", "prompt": "a", "stream": true, "fake": {"hang_after": 1}}'
    async with FakePod("a").serve() as pod, start_proxy(PodConfig("a", pod.url), max_in_flight=1) as proxy:
        first = await send(proxy, streaming)
        assert first.status == 200
        async with await send(proxy, streaming) as response:
            assert response.status == 503
            assert (await error_of(response))["code"] == "overloaded"
            assert response.headers["Retry-After"] == "1"
        async with proxy.client.get(proxy.url + "/health") as response:
            assert response.status == 200, "the router is busy, not ill"
        async with proxy.client.get(proxy.url + "/metrics") as response:
            text = await response.text()
        assert "kvrouter_proxy_overloads_total 1.0" in text
        assert 'kvrouter_pod_running_requests{phase="decode",pod="a"} 1.0' in text
        first.close()
        async with asyncio.timeout(20):
            await pod.cancelled.wait()
            status = 503
            while status == 503:  # the place is given back when the handler has ended
                async with await send(proxy, b'{"model": "m", "prompt": "a"}') as response:
                    status = response.status
            assert status == 200


async def test_body_that_does_not_come_is_408(start_proxy: StartProxy) -> None:
    async with start_proxy(POD, client_timeout=0.05) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("is_stream", [True, False])
async def test_client_that_does_not_read_loses_its_place(start_proxy: StartProxy, is_stream: bool) -> None:
    fake = {"chunks": 64, "padding": 1 << 20}  # more than the sockets in between hold
    body = json.dumps({"model": "m", "prompt": "a", "stream": is_stream, "fake": fake}).encode()
    options = {"client_timeout": 0.2, "max_in_flight": 1}
    async with FakePod("a").serve() as pod, start_proxy(PodConfig("a", pod.url), **options) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.server.port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await asyncio.wait_for(pod.running.wait(), 20)
            status = 503
            async with asyncio.timeout(20):
                while status == 503:
                    async with await send(proxy, b'{"model": "m", "prompt": "a"}') as response:
                        status = response.status
            assert status == 200


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_oversized_body_is_413(start_proxy: StartProxy, is_chunked: bool) -> None:
    data = json.dumps({"model": "m", "prompt": "x" * 10_000}).encode()

    async def pieces() -> object:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    async with start_proxy(POD, max_body_bytes=4096) as proxy:
        body = pieces() if is_chunked else data
        async with proxy.client.post(proxy.url + "/v1/completions", data=body) as response:
            assert response.status == 413
            error = await error_of(response)
            assert error["code"] == "body_too_large"
            assert "4096 bytes" in str(error["message"])


async def test_unknown_path_and_method_are_openai_errors(start_proxy: StartProxy) -> None:
    async with start_proxy(POD) as proxy:
        async with proxy.client.get(proxy.url + "/v1/nothing") as response:
            assert response.status == 404
            assert "/v1/nothing" in str((await error_of(response))["message"])
        async with proxy.client.get(proxy.url + "/v1/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            await error_of(response)


async def test_models_are_learnt_from_the_pods(start_proxy: StartProxy) -> None:
    async with (
        FakePod("a", model="n").serve() as pod,
        start_proxy(POD, PodConfig("b", pod.url)) as proxy,
        proxy.client.get(proxy.url + "/v1/models") as response,
    ):
        document = await response.json()
    assert document["object"] == "list"
    assert [(model["id"], model["object"]) for model in document["data"]] == [("m", "model"), ("n", "model")]
