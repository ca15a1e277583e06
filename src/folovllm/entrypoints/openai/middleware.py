"""What every HTTP request passes on its way in: a request id, the API key, a limit on the body, a line in the log."""

import hmac
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from folovllm.entrypoints.openai.errors import error_response
from folovllm.entrypoints.openai.protocol import RequestError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 2**20
_MAX_ID_LENGTH = 128
# Probes and scrapers carry no key.
_OPEN_PATHS = frozenset({"/health", "/metrics", "/version"})


class RequestGate:
    """ASGI middleware. Plain ASGI, because wrapping the response would hide a client's disconnect."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        left, status, start = MAX_BODY_BYTES, 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        async def receive_limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large()
            return message

        refusal = self._refusal(scope["path"], headers)
        try:
            if refusal is not None:
                await error_response(refusal)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive_limited, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in _OPEN_PATHS else logging.INFO
            seconds = time.monotonic() - start
            line = "request id=%s method=%s path=%r status=%d seconds=%.3f"
            logger.log(level, line, request_id, scope["method"], scope["path"], status, seconds)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        if self._expected is not None and path not in _OPEN_PATHS:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._expected):
                return RequestError("missing or wrong API key", code="invalid_api_key", status=401)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            return _too_large()
        return None


def _too_large() -> RequestError:
    return RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large", status=413)


def _request_id(headers: Headers) -> str:
    """The caller's id, when it is one that can be sent back and logged as it is."""
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= _MAX_ID_LENGTH and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex
