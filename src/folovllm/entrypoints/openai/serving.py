"""What the completion endpoints do: bodies to requests, outputs to answers and to streams."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from folovllm.engine.async_llm import AsyncLLM, RequestStream
from folovllm.engine.messages import EngineCoreRequest
from folovllm.engine.output_processor import RequestDelta
from folovllm.engine.processor import PromptType
from folovllm.entrypoints.openai.errors import GenerationFailedError, describe
from folovllm.entrypoints.openai.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionRequest,
    ChatMessage,
    CompletionBody,
    CompletionChoice,
    CompletionRequest,
    ErrorResponse,
    PromptTokensDetails,
    RequestError,
    Usage,
)
from folovllm.sampling_params import SamplingParams

MAX_PROMPTS = 1024
"""Prompts of one call."""
_DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Job:
    """One API call: the streams of its prompts. To be closed, which aborts what is unfinished."""

    id: str
    created: int
    model: str
    kind: Literal["completion", "chat"]
    streams: list[RequestStream]
    include_usage: bool

    def close(self) -> None:
        """Abort what is unfinished. Idempotent."""
        for stream in self.streams:
            stream.close()

    def usage(self) -> Usage:
        """Tokens so far."""
        states = [stream.state for stream in self.streams]
        prompt = sum(len(state.prompt_token_ids) for state in states)
        completion = sum(state.num_output_tokens for state in states)
        details = PromptTokensDetails(
            sum(state.num_cached_tokens for state in states),
            sum(state.num_external_cached_tokens for state in states),
        )
        return Usage(prompt, completion, prompt + completion, details)


class OpenAIServing:
    """Serves one model under one name."""

    def __init__(self, engine: AsyncLLM, model_name: str) -> None:
        self.engine = engine
        self.model_name = model_name

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the served one; none given means it.

        Raises:
            RequestError: 404, naming the served model.
        """
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server serves {self.model_name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def start_completion(self, body: CompletionRequest) -> Job:
        """Send the prompts of a completion to the engine.

        Raises:
            InvalidRequestError: the body cannot be served.
            EngineDeadError: the core is dead.
        """
        self.check_model(body.model)
        body.check_parameters()
        prompts = _prompts(body.prompt)
        token_ids = [await self.engine.tokenize(p, add_special_tokens=body.add_special_tokens) for p in prompts]
        options = body.sampling_options()
        requests = [self._request(ids, options, body.max_tokens, body.cache_salt) for ids in token_ids]
        return self._start("completion", requests, body.include_usage)

    async def start_chat(self, body: ChatCompletionRequest) -> Job:
        """Send a conversation to the engine.

        Raises:
            InvalidRequestError: the body cannot be served.
            EngineDeadError: the core is dead.
        """
        self.check_model(body.model)
        body.check_parameters()
        prompt = self.render_chat(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        token_ids = await self.engine.tokenize(prompt, add_special_tokens=body.add_special_tokens)
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        request = self._request(token_ids, body.sampling_options(), max_tokens, body.cache_salt)
        return self._start("chat", [request], body.include_usage)

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        """The prompt for a conversation.

        Raises:
            InvalidRequestError: messages that are not text, or that the chat template refuses.
        """
        flat = [_flatten(message, index) for index, message in enumerate(messages)]
        reserved = {"messages", "add_generation_prompt"} & variables.keys()
        if reserved:
            raise RequestError(f"chat_template_kwargs must not hold {reserved.pop()!r}", param="chat_template_kwargs")
        return self.engine.processor.render_chat(flat, add_generation_prompt=add_generation_prompt, **variables)

    async def collect(self, job: Job) -> CompletionBody:
        """The whole answer of a job.

        Raises:
            EngineDeadError: the core died on the way.
            GenerationFailedError: the core gave a prompt up.
        """
        totals = [RequestDelta() for _ in job.streams]
        async for index, delta in _merge(job.streams):
            totals[index].merge(delta)
        choices = [
            CompletionChoice(index=i, text=t.text, finish_reason=t.finish_reason, stop_reason=t.stop_reason)
            for i, t in enumerate(totals)
        ]
        if job.kind == "completion":
            return self._body(job, "text_completion", choices, job.usage())
        chat = [
            ChatChoice(
                index=c.index,
                message=ChatMessage("assistant", c.text),
                finish_reason=c.finish_reason,
                stop_reason=c.stop_reason,
            )
            for c in choices
        ]
        return self._body(job, "chat.completion", chat, job.usage())

    async def stream(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; a failure on the way becomes the last event before [DONE]."""
        first = True
        try:
            async for index, delta in _merge(job.streams):
                if job.kind == "chat" and first:
                    yield self._chat_event(job, ChatMessage("assistant", ""), RequestDelta())
                first = False
                if not delta.text and delta.finish_reason is None:  # in the middle of a character
                    continue
                if job.kind == "chat":
                    yield self._chat_event(job, ChatMessage(content=delta.text), delta)
                else:
                    yield self._completion_event(job, index, delta)
            if job.include_usage:
                yield _event(self._body(job, _chunk_object(job), [], job.usage()))
        except Exception as error:  # the headers are out: the stream is the only place left to tell
            yield _event(ErrorResponse(describe(error)[1]))
        yield _DONE

    def _completion_event(self, job: Job, index: int, delta: RequestDelta) -> bytes:
        choice = CompletionChoice(
            index=index, text=delta.text, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
        )
        return _event(self._chunk(job, [choice]))

    def _chat_event(self, job: Job, message: ChatMessage, delta: RequestDelta) -> bytes:
        choice = ChatChunkChoice(
            index=0, delta=message, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
        )
        return _event(self._chunk(job, [choice]))

    def _chunk(self, job: Job, choices: list[CompletionChoice] | list[ChatChunkChoice]) -> CompletionBody:
        body = self._body(job, _chunk_object(job), choices, None)
        if not job.include_usage:
            body.usage = msgspec.UNSET
        return body

    def _body(
        self,
        job: Job,
        kind: str,
        choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice],
        usage: Usage | None,
    ) -> CompletionBody:
        return CompletionBody(
            id=job.id, object=kind, created=job.created, model=job.model, choices=choices, usage=usage
        )

    def _request(
        self, token_ids: list[int], options: dict[str, Any], max_tokens: int | None, cache_salt: str | None
    ) -> EngineCoreRequest:
        processor = self.engine.processor
        limits = processor.limits
        if max_tokens is not None and len(token_ids) + max_tokens > limits.max_model_len:
            raise RequestError(
                f"max_tokens={max_tokens} is too large: {limits.reason} and the prompt has {len(token_ids)}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        params = SamplingParams.from_options({**processor.facts.default_sampling, **options, "max_tokens": max_tokens})
        return processor.make_request(token_ids, params, cache_salt=cache_salt)

    def _start(
        self, kind: Literal["completion", "chat"], requests: list[EngineCoreRequest], include_usage: bool
    ) -> Job:
        prefix = "cmpl" if kind == "completion" else "chatcmpl"
        job = Job(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self.model_name, kind, [], include_usage)
        try:
            for index, request in enumerate(requests):
                named = msgspec.structs.replace(request, request_id=f"{job.id}-{index}")
                job.streams.append(self.engine.open(named))
        except BaseException:
            job.close()
            raise
        return job


async def _merge(streams: list[RequestStream]) -> AsyncGenerator[tuple[int, RequestDelta], None]:
    """The deltas of several streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, _checked(delta)
        return
    pending = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                delta = _checked(task.result())
                yield index, delta
                if delta.finish_reason is None:
                    pending[asyncio.ensure_future(anext(streams[index]))] = index
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _checked(delta: RequestDelta) -> RequestDelta:
    if delta.finish_reason == "error":
        raise GenerationFailedError("the engine could not complete this request")
    return delta


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[PromptType]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt=[] is not allowed; it must hold at least one token or prompt", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # the body was validated: all are integers
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} are allowed", param="prompt")
    return prompt


def _flatten(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is one text, as chat templates expect it."""
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where} has no role", param=where)
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text or a list of text parts", param=where)
    return {**message, "content": content}


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(
        f"{where} has a content part of type {kind!r}; only 'text' is supported",
        param=where,
        code="unsupported_parameter",
    )


def _chunk_object(job: Job) -> str:
    return "text_completion" if job.kind == "completion" else "chat.completion.chunk"


def _event(body: CompletionBody | ErrorResponse) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
