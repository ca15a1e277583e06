"""Exceptions to OpenAI errors: one table for answers and for events inside a stream."""

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from folovllm.engine.core_client import EngineOverloadedError
from folovllm.engine.processor import PromptTooLongError
from folovllm.entrypoints.openai.protocol import RequestError
from folovllm.entrypoints.openai.responses import ErrorInfo, ErrorResponse
from folovllm.errors import EngineDeadError, InvalidRequestError

logger = logging.getLogger(__name__)


class GenerationFailedError(Exception):
    """The core ended a request with finish reason "error"."""


def describe(error: Exception) -> tuple[int, ErrorInfo]:
    """The HTTP status and the body of an error."""
    match error:
        case RequestError():
            return error.status, _invalid(str(error), error.param, error.code)
        case PromptTooLongError():
            return 400, _invalid(str(error), None, "context_length_exceeded")
        case InvalidRequestError():
            return 400, _invalid(str(error), None, None)
        case RequestValidationError():
            return 400, _describe_validation(error)
        case EngineOverloadedError():
            return 503, ErrorInfo(message=str(error), type="server_error", code="overloaded")
        case EngineDeadError():
            return 500, ErrorInfo(message=str(error), type="server_error", code="engine_dead")
        case GenerationFailedError():
            return 500, ErrorInfo(message=str(error), type="server_error", code="generation_failed")
        case HTTPException():
            return error.status_code, _invalid(str(error.detail), None, None)
    logger.error("unexpected error in a request", exc_info=error)
    return 500, ErrorInfo(message="internal server error; the server's log tells more", type="server_error")


def error_response(error: Exception) -> Response:
    """The answer for an error."""
    status, info = describe(error)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 503:
        headers["retry-after"] = "1"
    return json_response(ErrorResponse(info), status, headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer with a JSON body."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def register_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's format."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (
        InvalidRequestError,
        EngineDeadError,
        EngineOverloadedError,
        GenerationFailedError,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)


def _invalid(message: str, param: str | None, code: str | None) -> ErrorInfo:
    return ErrorInfo(message=message, type="invalid_request_error", param=param, code=code)


def _describe_validation(error: RequestValidationError) -> ErrorInfo:
    details = error.errors()
    first = details[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _invalid(f"the body is not valid JSON: {reason}", None, "invalid_json")
    location = [str(part) for part in first["loc"][1:]]
    param = location[0] if location else None
    if param is None:
        return _invalid("the body must be a JSON object (content-type: application/json)", None, None)
    # A union reports every alternative it tried; they all belong to the same parameter.
    reasons = dict.fromkeys(d["msg"] for d in details if list(map(str, d["loc"][1:2])) == [param])
    return _invalid(f"{param}: {'; or: '.join(reasons)}", param, None)
