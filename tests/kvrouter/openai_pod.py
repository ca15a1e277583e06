"""A stand-in for an engine: an OpenAI server that answers as each request's `fake` field asks.

    fake: {"chunks": 3, "status": 200, "hang_after": null, "hang": false, "abort": false, "tear": false, "split": false,
           "padding": 0}

`hang_after` n: silent for ever after n chunks; `hang`: silent before the first byte; `abort`: closes the connection
without an answer; `tear`: half an event after `hang_after` chunks, then silence; `split`: an event in two writes;
`padding`: bytes that make every chunk so much longer.
Run as a program it is a process of its own that prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakePod:
    """One engine and what it has seen."""

    name: str
    model: str = "m"
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    health_status: int = 200
    num_health_checks: int = 0
    running: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[FakePod]:
        runner = web.AppRunner(self.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        self.num_health_checks += 1
        return web.Response(status=self.health_status)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        self.raw.append(raw)
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.running.set()
        fake = body.get("fake", {})
        try:
            if fake.get("abort"):
                assert request.transport is not None
                request.transport.close()
                await asyncio.Event().wait()
            if fake.get("hang"):
                await asyncio.Event().wait()
            if fake.get("status", 200) != 200:
                return web.json_response({"error": {"message": f"{self.name} says no"}}, status=fake["status"])
            if body.get("stream"):
                return await self._stream(request, fake, "messages" in body)
            return web.json_response(self._answer(" ".join(self._words(fake)), "messages" in body))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _stream(self, request: web.Request, fake: dict[str, Any], is_chat: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Engine": "fake"})
        await response.prepare(request)
        for number, word in enumerate(self._words(fake)):
            if number == fake.get("hang_after"):
                if fake.get("tear"):
                    await response.write(b'data: {"choi')
                await asyncio.Event().wait()
            event = self.event(word, is_chat)
            if fake.get("split"):
                await response.write(event[:9])
                event = event[9:]
            await response.write(event)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _words(self, fake: dict[str, Any]) -> list[str]:
        padding = "x" * fake.get("padding", 0)
        return [f"{self.name}-{number}{padding}" for number in range(fake.get("chunks", 3))]

    def event(self, word: str, is_chat: bool) -> bytes:
        choice = {"delta": {"content": word, "role": "assistant"}} if is_chat else {"text": word}
        document = self._document("chunk", [{"index": 0, "finish_reason": None, **choice}])
        return b"data: " + json.dumps(document).encode() + b"\n\n"

    def _answer(self, text: str, is_chat: bool) -> dict[str, Any]:
        choice = {"message": {"content": text, "role": "assistant"}} if is_chat else {"text": text}
        return self._document("whole", [{"index": 0, "finish_reason": "stop", **choice}])

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"{self.name}-{kind}", "object": kind, "created": 1, "model": self.model, "choices": choices}


class PodProcess:
    """A `FakePod` in a process of its own, to be killed."""

    def __init__(self, name: str, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, str(port)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        self.name = name
        self.port = int(self._process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextlib.contextmanager
def pod_process(name: str, port: int = 0) -> Iterator[PodProcess]:
    process = PodProcess(name, port)
    try:
        yield process
    finally:
        process.close()


async def _main(name: str, port: int) -> None:
    async with FakePod(name, port=port).serve() as pod:
        sys.stdout.write(f"{pod.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
