"""The HTTP routes of the proxy: OpenAI's completions, chat completions and models, health and metrics.

Every error is an OpenAI error object: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from kvrouter.config import ProxyConfig
from kvrouter.errors import RequestError
from kvrouter.proxy.forwarding import Forwarder, client_deadline
from kvrouter.proxy.metrics import ProxyMetrics
from kvrouter.proxy.pods import PodRegistry, PodState
from kvrouter.proxy.protocol import COMPLETION_PATHS, decode_body, encode_error, encode_models
from kvrouter.proxy.routing import Router

logger = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_SCRAPES: Final = 16
"""Requests for /metrics in hand at once; each waits for a thread."""


class _Places:
    """A number of requests that may be in hand at once; on the event loop's thread."""

    def __init__(self, limit: int, on_refused: Callable[[], None] = lambda: None) -> None:
        self._limit = limit
        self._num_taken = 0
        self._on_refused = on_refused

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            RequestError: all are taken; status 503.
        """
        if self._num_taken >= self._limit:
            self._on_refused()
            message = f"{self._limit} requests are in hand already; try again later"
            raise RequestError(503, message, kind="server_error", code="overloaded")
        self._num_taken += 1
        try:
            yield
        finally:
            self._num_taken -= 1


def make_app(
    registry: PodRegistry, router: Router, forwarder: Forwarder, config: ProxyConfig, metrics: ProxyMetrics
) -> web.Application:
    """Return the aiohttp application; what it uses stays the caller's."""
    places = _Places(config.max_in_flight, metrics.overloads.inc)
    scrapes = _Places(_MAX_SCRAPES)

    async def complete(request: web.Request) -> web.StreamResponse:
        start = time.perf_counter()
        if (request.content_length or 0) > config.max_body_bytes:
            raise _too_large(config.max_body_bytes)
        with places.take():
            data = await _read_body(request, config.client_timeout)
            body = decode_body(request.path, data)
            prompt = await router.prepare(body, router.resolve_model(body.model), len(data))
            response = await forwarder.forward(request, data, prompt, start)
            if not response.prepared:  # sent here, so that it keeps its place until the client has it
                with contextlib.suppress(ConnectionError):  # the client is gone
                    async with client_deadline(request, config.client_timeout):
                        await response.prepare(request)
                        await response.write_eof()
            return response

    async def models(request: web.Request) -> web.Response:
        return _json(encode_models(registry.models()))

    async def health(request: web.Request) -> web.Response:
        states = {pod.name: pod.state.value for pod in registry.pods}
        is_ok = PodState.UP in (pod.state for pod in registry.pods)
        document = {"status": "ok" if is_ok else "no healthy pod", "pods": states}
        return _json(msgspec.json.encode(document), 200 if is_ok else 503)

    async def render_metrics(request: web.Request) -> web.Response:
        with scrapes.take():
            text = await metrics.render()
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application(middlewares=[_openai_errors(config)], client_max_size=config.max_body_bytes)
    for path in COMPLETION_PATHS:
        app.router.add_post(path, complete)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", render_metrics)
    return app


def _openai_errors(config: ProxyConfig) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            return _error(error)
        except web.HTTPRequestEntityTooLarge:
            return _error(_too_large(config.max_body_bytes))
        except web.HTTPException as error:
            if error.status < 400:
                raise
            allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            message = f"{request.method} {request.path}: {error.reason}"
            return _error(RequestError(error.status, message), allowed)
        except Exception:  # the boundary of one request: it fails alone, and the log tells why
            logger.exception("event=request_failed path=%s", request.path)
            if request.writer.output_size > 0:
                raise  # half an answer is out: all that is left is to break the connection
            return _error(RequestError(500, "internal error of the router; its log tells more", kind="server_error"))

    return middleware


async def _read_body(request: web.Request, timeout_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError as error:
        raise RequestError(408, f"the body did not come within {timeout_s:g} s", code="body_too_slow") from error


def _too_large(max_body_bytes: int) -> RequestError:
    return RequestError(413, f"the body is larger than {max_body_bytes} bytes", code="body_too_large")


def _error(error: RequestError, headers: dict[str, str] | None = None) -> web.Response:
    response = _json(encode_error(error), error.status)
    response.headers.update(headers or {})
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")
