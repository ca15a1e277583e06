"""The routes of the server: OpenAI's, and those of whoever operates it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib import metadata

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from folovllm.entrypoints.openai.errors import error_response, json_response, register_error_handlers
from folovllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
)
from folovllm.entrypoints.openai.responses import DetokenizeResponse, ModelCard, ModelList, TokenizeResponse
from folovllm.entrypoints.openai.serving import Job, OpenAIServing
from folovllm.errors import EngineDeadError

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_GONE = 499


class EventStream(StreamingResponse):
    """Server-sent events of a job; the job is closed however the response ends."""

    def __init__(self, serving: OpenAIServing, job: Job) -> None:
        super().__init__(serving.stream(job), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that leaves cancels this, which aborts the request."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


def build_app(serving: OpenAIServing, model_root: str) -> FastAPI:
    """The application that serves one model; `model_root` is where it came from."""
    app = FastAPI(title="folovllm", version=package_version())
    register_error_handlers(app)
    app.include_router(_openai_router(serving, model_root))
    app.include_router(_tokenizer_router(serving))
    app.include_router(_operations_router(serving))
    return app


def package_version() -> str:
    """The installed version; "unknown" when running from a source tree."""
    try:
        return metadata.version("kvstrata")
    except metadata.PackageNotFoundError:
        return "unknown"


def _openai_router(serving: OpenAIServing, model_root: str) -> APIRouter:
    router = APIRouter(prefix="/v1")
    created = int(time.time())

    async def answer(request: Request, start: Callable[[], Awaitable[Job]], stream: bool) -> Response:
        job = await start()
        if stream:
            return EventStream(serving, job)
        try:
            return await _until_disconnect(request, serving, job)
        finally:
            job.close()

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(request, lambda: serving.start_completion(body), body.stream)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await answer(request, lambda: serving.start_chat(body), body.stream)

    def card() -> ModelCard:
        limits = serving.engine.processor.limits
        return ModelCard(id=serving.model_name, created=created, root=model_root, max_model_len=limits.max_model_len)

    @router.get("/models")
    async def models() -> Response:
        return json_response(ModelList(data=[card()]))

    @router.get("/models/{model:path}")
    async def model(model: str) -> Response:
        serving.check_model(model)
        return json_response(card())

    return router


def _tokenizer_router(serving: OpenAIServing) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        serving.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        special, prompt = body.add_special_tokens, body.prompt
        if body.messages is not None:
            prompt = serving.chat.render(body)
        if special is None:
            special = body.messages is None
        processor = serving.engine.processor
        tokenizer = processor.require_tokenizer()
        # Counting is not serving: a text longer than the context has a number of tokens too.
        tokens = await serving.engine.encode(prompt or "", add_special_tokens=special)
        strings = [tokenizer.backend.id_to_token(t) or "" for t in tokens] if body.return_token_strs else None
        limit = processor.limits.max_model_len
        return json_response(
            TokenizeResponse(count=len(tokens), max_model_len=limit, tokens=tokens, token_strs=strings)
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        serving.check_model(body.model)
        processor = serving.engine.processor
        processor.check_token_ids(body.tokens)
        text = processor.require_tokenizer().decode(body.tokens, skip_special_tokens=False)
        return json_response(DetokenizeResponse(text))

    return router


def _operations_router(serving: OpenAIServing) -> APIRouter:
    router = APIRouter()
    engine = serving.engine

    @router.get("/health")
    async def health() -> Response:
        try:
            engine.check_health()
        except EngineDeadError as error:
            response = error_response(error)
            response.status_code = 503
            return response
        return Response(status_code=200)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type=_METRICS_TYPE)

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": package_version()})

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(reset_external: bool = False, reset_connector: bool = False) -> Response:
        """Drop the device's prefix cache; with `reset_external` (or `reset_connector`) the connector's store too."""
        if not await engine.reset_prefix_cache(reset_external or reset_connector):
            raise RequestError(
                "the prefix cache is in use; nothing was dropped", code="prefix_cache_in_use", status=409
            )
        return json_response({"success": True})

    return router


async def _until_disconnect(request: Request, serving: OpenAIServing, job: Job) -> Response:
    """The answer of a job; given up when the client leaves before it is there."""
    collecting = asyncio.ensure_future(serving.collect(job))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return json_response(collecting.result())
        return Response(status_code=_CLIENT_GONE)
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
