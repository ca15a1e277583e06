"""What the completion endpoints do: bodies to requests, outputs to answers and streams. Mirrors vllm's serving.py."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from folovllm.engine.async_llm import AsyncLLM, RequestStream
from folovllm.engine.messages import EngineCoreRequest
from folovllm.engine.output_processor import RequestDelta
from folovllm.engine.parallel_sampling import fan_out
from folovllm.engine.processor import PromptType
from folovllm.entrypoints.openai.chat import ChatRenderer
from folovllm.entrypoints.openai.errors import GenerationFailedError, describe
from folovllm.entrypoints.openai.logprobs import prompt_logprobs
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, RequestError
from folovllm.entrypoints.openai.responses import (
    CompletionBody,
    ErrorResponse,
    PromptTokensDetails,
    Usage,
)
from folovllm.entrypoints.openai.writers import ChatWriter, Choice, ChoiceWriter, CompletionOptions, CompletionWriter
from folovllm.sampling_params import SamplingParams

MAX_CHOICES = 1024
"""Prompts of one call, times the completions of each."""
_DONE = b"data: [DONE]\n\n"
_Body = CompletionRequest | ChatCompletionRequest


@dataclass(slots=True)
class Job:
    """One API call: a stream and a writer per choice. To be closed, which aborts what is unfinished."""

    id: str
    created: int
    model: str
    kind: Literal["completion", "chat"]
    body: _Body
    streams: list[RequestStream] = field(default_factory=list)
    """Of n choices for the first prompt, n for the second, ..."""
    writers: list[ChoiceWriter] = field(default_factory=list)

    @property
    def num_per_prompt(self) -> int:
        """Choices of each prompt."""
        return self.body.n or 1

    def close(self) -> None:
        """Abort what is unfinished. Idempotent."""
        for stream in self.streams:
            stream.close()

    def usage(self) -> Usage:
        """Tokens so far."""
        states = [stream.state for stream in self.streams]
        firsts = states[:: self.num_per_prompt]
        prompt = sum(len(state.prompt_token_ids) for state in firsts)
        completion = 0 if _is_prompt_only(self.body) else sum(state.num_output_tokens for state in states)
        details = PromptTokensDetails(
            sum(state.num_cached_tokens for state in firsts),
            sum(state.num_external_cached_tokens for state in firsts),
        )
        return Usage(prompt, completion, prompt + completion, details)

    def writers_to_ask(self, index: int) -> Sequence[ChoiceWriter]:
        """Writers that may have something to say now that the choice `index` got on: others wait for the first."""
        n = self.num_per_prompt
        return self.writers[index + 1 : index + n] if n > 1 and index % n == 0 else ()


class OpenAIServing:
    """Serves one model under one name."""

    def __init__(self, engine: AsyncLLM, model_name: str, tool_call_parser: str = "auto") -> None:
        """Serve an engine that has started.

        Raises:
            ConfigError: there is no such tool call parser.
        """
        self.engine = engine
        self.model_name = model_name
        self.chat = ChatRenderer(engine.processor, tool_call_parser)

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
        tokenizer = self.engine.processor.require_tokenizer() if body.echo else self.engine.processor.tokenizer
        prompts = _prompts(body.prompt)
        options = body.sampling_options()
        token_ids = [await self.engine.tokenize(p, add_special_tokens=body.add_special_tokens) for p in prompts]
        max_tokens = 1 if _is_prompt_only(body) else body.max_tokens
        requests = [self._request(ids, body, options, max_tokens) for ids in token_ids]
        job = self._start("completion", body, requests)
        how = CompletionOptions(body.logprobs, body.echo, _is_prompt_only(body), body.prompt_logprobs is not None)
        n = job.num_per_prompt
        for index in range(len(job.streams)):
            prompt = prompts[index // n]
            first = job.streams[index - index % n].state
            text = prompt if isinstance(prompt, str) else None
            job.writers.append(CompletionWriter(index, text, first, how, tokenizer))
        return job

    async def start_chat(self, body: ChatCompletionRequest) -> Job:
        """Send a conversation to the engine.

        Raises:
            InvalidRequestError: the body cannot be served.
            EngineDeadError: the core is dead.
        """
        self.check_model(body.model)
        body.check_parameters()
        options = body.sampling_options()
        make_parser = self.chat.demand_tools(body, options)
        token_ids = await self.engine.tokenize(self.chat.render(body), add_special_tokens=body.add_special_tokens)
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        job = self._start("chat", body, [self._request(token_ids, body, options, max_tokens)])
        max_calls = 1 if body.parallel_tool_calls is False else None
        for index in range(len(job.streams)):
            parser = None if make_parser is None else make_parser()
            tokenizer = self.engine.processor.tokenizer
            job.writers.append(ChatWriter(index, parser, max_calls, options.get("logprobs"), tokenizer))
        return job

    async def collect(self, job: Job) -> CompletionBody:
        """The whole answer of a job.

        Raises:
            EngineDeadError: the core died on the way.
            GenerationFailedError: the core gave a prompt up.
        """
        totals = [RequestDelta() for _ in job.streams]
        async for index, delta in _merge(job.streams):
            totals[index].merge(delta)
        choices = [writer.whole(total) for writer, total in zip(job.writers, totals, strict=True)]
        body = _body(job, "text_completion" if job.kind == "completion" else "chat.completion", choices)
        body.usage = job.usage()
        if job.kind == "chat" and job.body.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs(job.streams[0].state.prompt_logprobs or [])
        return body

    async def stream(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; a failure on the way becomes the last event before [DONE]."""
        kind = _chunk_object(job)
        options = job.body.stream_options
        try:
            async for index, delta in _merge(job.streams):
                found = list(job.writers[index].pieces(delta))
                for writer in job.writers_to_ask(index):
                    found += writer.pieces(None)
                for choice in found:
                    chunk = _body(job, kind, [choice])
                    if options is not None and options.include_usage:
                        chunk.usage = job.usage() if options.continuous_usage_stats else None
                    yield _event(chunk)
            if options is not None and options.include_usage:
                last = _body(job, kind, [])
                last.usage = job.usage()
                yield _event(last)
        except Exception as error:  # the headers are out: the stream is the only place left to tell
            yield _event(ErrorResponse(describe(error)[1]))
        yield _DONE

    def _request(
        self, token_ids: list[int], body: _Body, options: dict[str, Any], max_tokens: int | None
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
        return processor.make_request(token_ids, params, cache_salt=body.cache_salt, priority=body.priority)

    def _start(self, kind: Literal["completion", "chat"], body: _Body, requests: list[EngineCoreRequest]) -> Job:
        if len(requests) * (body.n or 1) > MAX_CHOICES:
            raise RequestError(
                f"n={body.n or 1} for {len(requests)} prompts is too much: at most {MAX_CHOICES} choices are allowed",
                param="n",
            )
        prefix = "cmpl" if kind == "completion" else "chatcmpl"
        job = Job(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), self.model_name, kind, body)
        try:
            for index, request in enumerate(requests):
                named = msgspec.structs.replace(request, request_id=f"{job.id}-{index}")
                job.streams += [self.engine.open(one) for one in fan_out(named)]
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
    if len(prompt) > MAX_CHOICES:
        raise RequestError(f"prompt holds {len(prompt)} prompts; at most {MAX_CHOICES} are allowed", param="prompt")
    return prompt


def _is_prompt_only(body: _Body) -> bool:
    return isinstance(body, CompletionRequest) and body.echo and body.max_tokens == 0


def _chunk_object(job: Job) -> str:
    return "text_completion" if job.kind == "completion" else "chat.completion.chunk"


def _body(job: Job, kind: str, choices: Sequence[Choice]) -> CompletionBody:
    return CompletionBody(id=job.id, object=kind, created=job.created, model=job.model, choices=list(choices))


def _event(body: CompletionBody | ErrorResponse) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
