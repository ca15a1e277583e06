"""The asynchronous engine: front end on an asyncio loop, core in a child process. Mirrors vllm's async_llm.py."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from folovllm.engine.arg_utils import EngineArgs, resolve_checkpoint
from folovllm.engine.core_client import MAX_REQUESTS_IN_FLIGHT, EngineOverloadedError, ProcClient
from folovllm.engine.core_handle import EngineCoreHandle, start_engine_core
from folovllm.engine.messages import EngineCoreOutputs, EngineCoreRequest
from folovllm.engine.output_processor import OutputProcessor, RequestDelta, RequestState
from folovllm.engine.parallel_sampling import ParentRequest, fan_out
from folovllm.engine.processor import Limits, Processor, PromptType
from folovllm.errors import EngineDeadError, InvalidRequestError, ModelLoadError
from folovllm.metrics.stats import EngineMetrics
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.model_files import read_model_facts
from folovllm.transformers_utils.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0
"""How long loading the model may take."""
STALL_TIMEOUT_S = 600.0
"""A core that has work and is silent for so long is dead: every step, however long its prefill, ends with a message."""
_INLINE_CHARS = 4000
"""Longer prompts (about a millisecond of work) are tokenised beside the loop."""


class RequestStream:
    """What one request produces: iterate it inside a `with` block, leaving which aborts an unfinished request."""

    def __init__(self, state: RequestState, abort: Callable[[str], None]) -> None:
        self.state = state
        self._abort = abort
        self._wake = asyncio.Event()
        self._finished = False
        state.on_ready = self._wake.set

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestDelta:
        """What came since the last time, all in one when the caller was slow.

        Raises:
            EngineDeadError: the core died.
        """
        if self._finished:
            raise StopAsyncIteration
        while (delta := self.state.take()) is None:
            self._wake.clear()
            await self._wake.wait()
        self._finished = delta.finish_reason is not None
        return delta

    def close(self) -> None:
        """Abort the request unless it has finished. Idempotent."""
        if not self._finished:
            self._finished = True
            self._abort(self.state.request_id)

    def __enter__(self) -> "RequestStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncLLM:
    """The engine as a server uses it. Belongs to one asyncio loop."""

    def __init__(self, handle: EngineCoreHandle, metrics: EngineMetrics) -> None:
        """Listen to a core that was just started; `start` waits for it."""
        self.metrics = metrics
        self._client = ProcClient(handle, self._take_outputs, self._take_death)
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._processor: Processor | None = None
        self._outputs = OutputProcessor(None, metrics)
        self._busy_since = 0.0
        self._watchdog: asyncio.Task[None] | None = None

    @classmethod
    async def from_engine_args(cls, args: EngineArgs, *, start_timeout_s: float = START_TIMEOUT_S) -> "AsyncLLM":
        """Start a core and wait until it can serve.

        Raises:
            ModelLoadError: the core could not load the model; the message is its own.
            ConfigError: an option is out of its range.
        """
        args.check()
        directory = await asyncio.to_thread(resolve_checkpoint, args.model)  # may download
        engine = cls(start_engine_core(args), EngineMetrics(args.served_model_name or args.model))
        try:
            await engine.start(directory, args.skip_tokenizer_init, start_timeout_s)
            engine.processor.scheduling_policy = args.scheduling_policy
            engine.metrics.set_cache_config(
                block_size=args.block_size,
                num_gpu_blocks=engine.processor.limits.pool_tokens // args.block_size + 1,
                enable_prefix_caching=args.enable_prefix_caching,
            )
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    async def start(self, directory: Path, skip_tokenizer_init: bool, timeout_s: float) -> None:
        """Read tokenizer and configuration of the checkpoint while the core loads its weights.

        Raises:
            ModelLoadError: either of them failed.
        """
        tokenizer = None if skip_tokenizer_init else await asyncio.to_thread(Tokenizer.from_checkpoint, directory)
        facts = read_model_facts(directory)
        try:
            ready = await self._client.wait_ready(timeout_s)
        except EngineDeadError as error:
            raise ModelLoadError(f"the engine did not start: {error}") from error
        limits = Limits(ready.context_len, ready.pool_tokens)
        self._processor = Processor(tokenizer, limits, facts)
        self._outputs = OutputProcessor(tokenizer, self.metrics)
        self._watchdog = asyncio.create_task(self._watch(), name="engine-core-watchdog")

    @property
    def processor(self) -> Processor:
        """The request maker; there once `start` has returned."""
        assert self._processor is not None, "start() comes first"
        return self._processor

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._outputs)

    def check_health(self) -> None:
        """Return when the engine can serve.

        Raises:
            EngineDeadError: the core is dead.
        """
        if self._client.death is not None:
            raise self._client.death

    async def tokenize(self, prompt: PromptType, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt that can be served. See `Processor.tokenize`."""
        if isinstance(prompt, str):
            prompt = await self.encode(prompt, add_special_tokens=add_special_tokens)
        return self.processor.tokenize(prompt)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of any text; a long one is tokenised beside the loop, which goes on meanwhile."""
        tokenizer = self.processor.require_tokenizer()
        if len(text) <= _INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    def open(self, request: EngineCoreRequest, prompt: str | None = None) -> RequestStream:
        """Send a request of one sequence (see `fan_out`) to the core; the stream must be closed.

        Raises:
            InvalidRequestError: it has several.
            EngineDeadError: the core is dead.
            EngineOverloadedError: too many requests are in flight.
        """
        self.check_health()
        if request.sampling_params.n != 1:
            raise InvalidRequestError(f"n={request.sampling_params.n} is not possible in one stream; open one for each")
        if len(self._outputs) >= MAX_REQUESTS_IN_FLIGHT:
            raise EngineOverloadedError(f"{MAX_REQUESTS_IN_FLIGHT} requests are in flight; try again later")
        if not len(self._outputs):
            self._busy_since = time.monotonic()
        stream = RequestStream(self._outputs.add_request(request, prompt), self._abort)
        try:
            self._client.add_request(request)
        except (EngineDeadError, EngineOverloadedError):
            self._outputs.abort(request.request_id)
            raise
        return stream

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt, yielding the request's whole state as it grows.

        Closing or cancelling the generator aborts the request. `priority`: lower goes first.

        Raises:
            InvalidRequestError: the prompt or an option cannot be served.
            EngineDeadError: the core is dead, or dies on the way.
        """
        token_ids = await self.tokenize(prompt)
        request = self.processor.make_request(
            token_ids, sampling_params, request_id=request_id, cache_salt=cache_salt, priority=priority
        )
        wake = asyncio.Event()
        with contextlib.ExitStack() as streams:
            states = []
            for child in fan_out(request):
                stream = streams.enter_context(self.open(child, prompt if isinstance(prompt, str) else None))
                stream.state.on_ready = wake.set
                states.append(stream.state)
            parent, output = ParentRequest(request.request_id, states), None
            while output is None or not output.finished:
                wake.clear()
                if (output := parent.take()) is None:
                    await wake.wait()
                else:
                    yield output

    async def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Drop the device's prefix cache, and the connector's store too when told to; False when it is in use.

        Raises:
            EngineDeadError: the core is dead.
        """
        return await self._client.reset_prefix_cache(reset_connector)

    async def shutdown(self) -> None:
        """Stop the core; whoever still waits gets an EngineDeadError. Idempotent."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._outputs.fail_all(EngineDeadError("the engine is shutting down"))
        await self._client.shutdown()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while self._client.death is None:
            await asyncio.sleep(STALL_TIMEOUT_S / 10)
            silent_s = time.monotonic() - max(self._client.last_heard, self._busy_since)
            if len(self._outputs) and silent_s > STALL_TIMEOUT_S:
                self._client.give_up(f"the engine core has been silent for {silent_s:.0f} s with requests in flight")

    def _abort(self, request_id: str) -> None:
        if self._outputs.abort(request_id):
            self._client.abort_requests([request_id])

    def _take_outputs(self, outputs: EngineCoreOutputs) -> None:
        to_abort = self._outputs.process(outputs)
        if to_abort:
            self._client.abort_requests(to_abort)

    def _take_death(self, error: EngineDeadError) -> None:
        self.metrics.observe_core_death()
        self._outputs.fail_all(error)
