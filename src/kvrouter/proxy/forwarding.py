"""Passes a request on to a pod and its answer back, and tries other pods while nothing of an answer has been sent.

An answer that is an event stream goes on as it comes, event by event: of an event that has come in part, the part is
held back, so that a stream whose pod dies can end in one clean error event. Every other answer goes on when it is
whole. A client that leaves cancels its handler, and with it the pod's work.

    outcome of an attempt                  | next pod? | the pod is then
    ---------------------------------------+-----------+----------------------------------
    connection refused, or not in time     | yes       | down
    disconnected before the first byte     | yes, or the same once more | checked at once
    status 503                             | yes       | counted as an error; passed on if nobody else is left
    silent for too long                    | no: 504   | checked at once
    breaks off after the first byte        | no: error event | checked at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from kvrouter.config import ProxyConfig
from kvrouter.errors import RequestError
from kvrouter.proxy.event_stream import EventBuffer
from kvrouter.proxy.health import HealthMonitor
from kvrouter.proxy.metrics import ProxyMetrics
from kvrouter.proxy.pods import PodRegistry
from kvrouter.proxy.protocol import encode_error_event
from kvrouter.proxy.routing import Choice, PreparedPrompt, Router

logger = logging.getLogger(__name__)

POD_HEADER: Final = "x-kvstrata-pod"
CACHED_TOKENS_HEADER: Final = "x-kvstrata-cached-tokens"

_HOP_BY_HOP: Final = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade")
)  # fmt: skip
_NOT_TO_POD: Final = _HOP_BY_HOP | {"host", "content-length", "accept-encoding", "expect"}
_NOT_TO_CLIENT: Final = _HOP_BY_HOP | {"content-length", "date", "server"}
_NO_AUTO_HEADERS: Final = ("User-Agent", "Accept")


class _AttemptFailedError(Exception):
    """A pod did not answer a request; another may."""

    def __init__(
        self, reason: str, error: RequestError, *, may_repeat: bool = False, answer: web.Response | None = None
    ):
        super().__init__(reason)
        self.reason = reason
        self.error = error
        self.may_repeat = may_repeat  # on the same pod, if there is no other
        self.answer = answer  # what the client gets if nobody else is left


class Forwarder:
    """Sends requests to the pods that a router chooses; on the event loop's thread."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        router: Router,
        registry: PodRegistry,
        health: HealthMonitor,
        config: ProxyConfig,
        metrics: ProxyMetrics,
    ) -> None:
        """Forward by `session`; nothing is owned."""
        self._session = session
        self._router = router
        self._registry = registry
        self._health = health
        self._max_attempts = config.max_attempts
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_timeout, sock_read=config.idle_timeout
        )
        self._client_timeout_s = config.client_timeout
        self._metrics = metrics

    async def forward(
        self, request: web.Request, data: bytes, prompt: PreparedPrompt, start: float
    ) -> web.StreamResponse:
        """Answer `request`, whose body is `data`, by the cheapest pod that takes it.

        Args:
            request: the client's.
            data: its body.
            prompt: what routing knows of it.
            start: when it came, by `time.perf_counter`.

        Raises:
            RequestError: no pod took it.
        """
        headers = CIMultiDict(
            (name, value) for name, value in request.headers.items() if name.lower() not in _NOT_TO_POD
        )
        headers["Accept-Encoding"] = "identity"
        tried: set[str] = set()
        repeatable: set[str] = set()
        failure: _AttemptFailedError | None = None
        for _ in range(self._max_attempts):
            choice = self._choose_next(prompt, tried, repeatable, failure)
            if choice is None:
                break
            if failure is None:
                self._metrics.routing_seconds.observe(time.perf_counter() - start)
            name = choice.pod.name
            repeatable.discard(name)
            try:
                answer = await self._attempt(request, data, headers, choice, start)
            except _AttemptFailedError as error:
                failure = error
                logger.warning("pod=%s event=attempt_failed reason=%s", name, error.reason)
                self._metrics.retries.labels(name, error.reason).inc()
                if error.may_repeat and name not in tried:
                    repeatable.add(name)
                tried.add(name)
                continue
            if tried - {name}:
                self._metrics.failovers.inc()
            return answer
        assert failure is not None, "max_attempts is at least 1"
        if failure.answer is not None:
            return failure.answer
        raise failure.error

    def _choose_next(
        self, prompt: PreparedPrompt, tried: set[str], repeatable: set[str], failure: _AttemptFailedError | None
    ) -> Choice | None:
        try:
            return self._router.choose(prompt, tried)
        except RequestError:
            if failure is None:
                raise
        if not repeatable:
            return None
        with contextlib.suppress(RequestError):
            return self._router.choose(prompt, tried - repeatable)
        return None

    async def _attempt(
        self, request: web.Request, data: bytes, headers: CIMultiDict[str], choice: Choice, start: float
    ) -> web.StreamResponse:
        """Send the request to one pod.

        Raises:
            _AttemptFailedError: it did not answer, and the client has seen nothing of this attempt.
            RequestError: it did not answer, and the request should not be repeated.
        """
        upstream: aiohttp.ClientResponse | None = None
        try:
            upstream = await self._open(request, data, headers, choice)
            if upstream.content_type == "text/event-stream":
                return await self._pass_stream(request, upstream, choice, start)
            return await self._pass_whole(upstream, choice, start)
        except (_AttemptFailedError, RequestError):
            choice.failed()
            raise
        except asyncio.CancelledError:
            self._metrics.disconnects.inc()
            raise
        finally:
            choice.done()
            if upstream is not None:
                upstream.close()  # no more than a release when the answer has been read to its end

    async def _open(
        self, request: web.Request, data: bytes, headers: CIMultiDict[str], choice: Choice
    ) -> aiohttp.ClientResponse:
        pod = choice.pod
        try:
            return await self._session.post(
                f"{pod.url}{request.path_qs}",
                data=data,
                headers=headers,
                timeout=self._timeout,
                skip_auto_headers=_NO_AUTO_HEADERS,
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._registry.unreachable(pod)
            self._health.suspect(pod)
            raise _AttemptFailedError("unreachable", _bad_gateway(choice, "cannot be reached")) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(choice, error) from error

    async def _pass_whole(self, upstream: aiohttp.ClientResponse, choice: Choice, start: float) -> web.Response:
        if upstream.status < 400:
            choice.first_byte()
        try:
            body = await upstream.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(choice, error) from error
        if upstream.status >= 400:
            choice.failed()  # refused: the pod has computed nothing of the prompt
        self._registry.answered(choice.pod, upstream.status)
        answer = web.Response(status=upstream.status, body=body, headers=_answer_headers(upstream, choice))
        if upstream.status == 503:
            error_503 = _bad_gateway(choice, "is not ready")
            raise _AttemptFailedError("status_503", error_503, answer=answer)
        self._note_answer(choice, upstream.status, start)
        return answer

    async def _pass_stream(
        self, request: web.Request, upstream: aiohttp.ClientResponse, choice: Choice, start: float
    ) -> web.StreamResponse:
        read = upstream.content.readany
        events = EventBuffer()
        try:
            chunk = await read()
            while not (ready := events.feed(chunk)) and chunk:
                chunk = await read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(choice, error) from error
        choice.first_byte()
        self._registry.answered(choice.pod, upstream.status)
        self._note_answer(choice, upstream.status, start)
        response = web.StreamResponse(status=upstream.status, headers=_answer_headers(upstream, choice))
        try:
            await response.prepare(request)
            while chunk:
                if ready:
                    await self._write(request, response, ready)
                try:
                    chunk = await read()
                except (aiohttp.ClientError, OSError) as error:
                    await self._write(request, response, encode_error_event(self._broken(choice, error)))
                    break
                ready = events.feed(chunk)
            else:
                if tail := ready + events.rest():
                    await self._write(request, response, tail)
            async with client_deadline(request, self._client_timeout_s):
                await response.write_eof()
        except (aiohttp.ClientConnectionResetError, ConnectionResetError):
            self._metrics.disconnects.inc()
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        async with client_deadline(request, self._client_timeout_s):
            await response.write(data)

    def _lost(self, choice: Choice, error: Exception) -> _AttemptFailedError | RequestError:
        """The pod went silent, or the connection away, before the first byte of an answer."""
        self._health.suspect(choice.pod)
        if isinstance(error, TimeoutError):
            return _bad_gateway(choice, "did not answer in time", status=504)
        failure = _bad_gateway(choice, "closed the connection before it answered")
        return _AttemptFailedError("disconnected", failure, may_repeat=True)

    def _broken(self, choice: Choice, error: Exception) -> RequestError:
        """The same after the first byte."""
        name = choice.pod.name
        logger.warning("pod=%s event=stream_broken error=%s", name, error or type(error).__name__)
        self._metrics.broken_streams.labels(name).inc()
        self._health.suspect(choice.pod)
        what = "fell silent" if isinstance(error, TimeoutError) else "broke off"
        return _bad_gateway(choice, f"{what} in the middle of its answer")

    def _note_answer(self, choice: Choice, status: int, start: float) -> None:
        name = choice.pod.name
        metrics = self._metrics
        metrics.requests.labels(name, str(status)).inc()
        metrics.first_byte_seconds.labels(name).observe(time.perf_counter() - start)
        metrics.prompt_tokens.labels(name).inc(choice.num_tokens)
        metrics.predicted_cached_tokens.labels(name).inc(choice.cached_tokens)


@contextlib.asynccontextmanager
async def client_deadline(request: web.Request, timeout_s: float) -> AsyncIterator[None]:
    """Break the connection to a client that does not take what is written in the block.

    Raises:
        ConnectionResetError: it took longer than `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        logger.warning("event=client_stalled path=%s", request.path)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read its answer") from error


def _answer_headers(upstream: aiohttp.ClientResponse, choice: Choice) -> CIMultiDict[str]:
    headers = CIMultiDict(
        (name, value) for name, value in upstream.headers.items() if name.lower() not in _NOT_TO_CLIENT
    )
    headers[POD_HEADER] = choice.pod.name
    headers[CACHED_TOKENS_HEADER] = str(choice.cached_tokens)
    return headers


def _bad_gateway(choice: Choice, what: str, status: int = 502) -> RequestError:
    return RequestError(status, f"pod {choice.pod.name} {what}", kind="server_error", code="pod_failed")
