"""A load generator for servers that speak OpenAI's API: what clients see. Mirrors vllm/benchmarks/serve.py.

arrival      sent          first token                      last token
   |--------------|-------------|----|----|----|----|----|-------|
    concurrency      TTFT         ITL  ITL  ...
                                '------ TPOT * (tokens - 1) -----'
                  '----------------------- E2EL -----------------'
"""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from folovllm.entrypoints.bench.options import ServeOptions
from folovllm.entrypoints.bench.report import report, summarize
from folovllm.entrypoints.bench.workload import Sample, make_samples
from folovllm.errors import FoloVLLMError

_MS = 1000.0
_LINE_LIMIT = 2**22


class ServerUnusableError(FoloVLLMError):
    """The server does not answer as it should."""


@dataclass(slots=True)
class _Timeline:
    """One request as its client saw it, in seconds of time.perf_counter()."""

    sent: float = 0.0
    token_times: list[float] = field(default_factory=list)
    """When each piece with text arrived."""
    end: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first."""
        if self.num_output_tokens < 2 or not self.token_times:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output_tokens - 1)


def run_serve_bench(options: ServeOptions) -> None:
    """Run the workload and report it.

    Raises:
        ConfigError: an option is not allowed.
        ServerUnusableError: the server cannot be reached, or answered no request.
        OSError: the result cannot be written.
    """
    options.check()
    begin, timelines = asyncio.run(_LoadGenerator(options).run())
    done = [timeline for timeline in timelines if timeline.error is None]
    errors = [timeline.error for timeline in timelines if timeline.error is not None]
    if not done:
        raise ServerUnusableError(f"all {len(timelines)} requests failed; the first: {errors[0]}")
    seconds = max(timeline.end for timeline in done) - begin
    output = sum(timeline.num_output_tokens for timeline in done)
    prompt = sum(timeline.num_prompt_tokens for timeline in done)
    gaps = [b - a for t in done for a, b in zip(t.token_times, t.token_times[1:], strict=False)]
    figures = {
        "completed": len(done),
        "failed": len(errors),
        "first error": errors[0] if errors else None,
        "seconds": seconds,
        "prompt tokens": prompt,
        "output tokens": output,
        "requests/s": len(done) / seconds,
        "output tokens/s": output / seconds,
        "total tokens/s": (prompt + output) / seconds,
        "TTFT (ms)": _milliseconds([t.token_times[0] - t.sent for t in done if t.token_times]),
        "TPOT (ms)": _milliseconds([t.tpot for t in done if t.tpot is not None]),
        "ITL (ms)": _milliseconds(gaps),
        "E2EL (ms)": _milliseconds([t.end - t.sent for t in done]),
    }
    report("serve", figures, options.output_json)


class _LoadGenerator:
    """Sends one workload."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._base = options.base_url.rstrip("/").removesuffix("/v1")
        self._slots = asyncio.Semaphore(options.max_concurrency or options.num_prompts)

    async def run(self) -> tuple[float, list[_Timeline]]:
        """When it began, and what became of each request."""
        options = self._options
        headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
        samples = make_samples(
            options.num_prompts, options.input_len, options.output_len, options.range_ratio, options.prompt_seed
        )
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    headers=headers,
                    connector=aiohttp.TCPConnector(limit=0),
                    timeout=aiohttp.ClientTimeout(total=options.timeout),
                    read_bufsize=_LINE_LIMIT,
                )
            )
            model = options.model or await self._first_model(session)
            bodies = [await self._body(session, model, sample) for sample in samples]
            await self._send(session, bodies[0])  # connections, caches, kernels: not measured
            progress = stack.enter_context(Progress(console=Console(stderr=True)))
            bar = progress.add_task("requests", total=len(bodies))
            begin = time.perf_counter()
            tasks = []
            async with asyncio.TaskGroup() as group:
                async for index in self._arrivals(begin):
                    task = group.create_task(self._send(session, bodies[index]))
                    task.add_done_callback(lambda _: progress.advance(bar))
                    tasks.append(task)
            return begin, [task.result() for task in tasks]

    async def _arrivals(self, begin: float) -> AsyncIterator[int]:
        """The index of each request at the time of its arrival, however long the ones before it take."""
        rate, due = self._options.request_rate, begin
        random = np.random.default_rng(self._options.prompt_seed + 1)
        for index in range(self._options.num_prompts):
            if not math.isinf(rate):
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                due += float(random.exponential(1 / rate))
            yield index

    async def _first_model(self, session: aiohttp.ClientSession) -> str:
        answer = await self._ask(session, "GET", "/v1/models")
        return str(answer["data"][0]["id"])

    async def _body(self, session: aiohttp.ClientSession, model: str, sample: Sample) -> dict[str, Any]:
        """The body of one request; token ids are cut from what the server's own tokenizer makes of random words."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": sample.output_len,
            "temperature": self._options.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._options.endpoint == "chat":
            return {**body, "messages": [{"role": "user", "content": sample.words()}]}
        tokens = await self._ask(session, "POST", "/tokenize", {"model": model, "prompt": sample.words()})
        return {**body, "prompt": tokens["tokens"][: sample.prompt_len]}

    async def _ask(
        self, session: aiohttp.ClientSession, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        url = self._base + path
        try:
            async with session.request(method, url, json=body) as response:
                text = await response.text()
                if response.status != 200:
                    raise ServerUnusableError(f"{method} {url} was answered with {response.status}: {text[:500]}")
                answer: dict[str, Any] = json.loads(text)
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerUnusableError(f"{method} {url} failed: {error or type(error).__name__}") from error

    async def _send(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> _Timeline:
        timeline = _Timeline()
        path = "/v1/chat/completions" if self._options.endpoint == "chat" else "/v1/completions"
        async with self._slots:
            timeline.sent = time.perf_counter()
            try:
                async with session.post(self._base + path, json=body) as response:
                    if response.status != 200:
                        timeline.error = f"{response.status}: {(await response.text())[:500]}"
                        return timeline
                    await _read_stream(response, timeline)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                timeline.error = str(error) or type(error).__name__
        return timeline


async def _read_stream(response: aiohttp.ClientResponse, timeline: _Timeline) -> None:
    """Note when text arrives; the last chunk tells the tokens."""
    finished = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        now, data = time.perf_counter(), line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            finished = True
            break
        event = json.loads(data)
        if "error" in event:
            timeline.error = str(event["error"].get("message", event["error"]))
            return
        for choice in event["choices"]:
            if choice.get("text") or choice.get("delta", {}).get("content"):
                timeline.token_times.append(now)
        if event.get("usage"):
            timeline.num_prompt_tokens = event["usage"]["prompt_tokens"]
            timeline.num_output_tokens = event["usage"]["completion_tokens"]
        timeline.end = now
    if not finished:
        timeline.error = "the stream ended before [DONE]"


def _milliseconds(seconds: list[float]) -> dict[str, float] | None:
    return summarize([value * _MS for value in seconds])
