"""How a front end reaches the core: in its own process, or in a child over ZMQ. Mirrors vllm/v1/engine/core_client.py.

front end                                  engine core process
PUSH bind input_endpoint    -- ToCore -->   PULL connect
PULL bind output_endpoint  <-- FromCore --  PUSH connect
sentinel                   <- exit code --  (noticed even when it is killed)
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from folovllm.engine.core_handle import EngineCoreHandle
from folovllm.engine.messages import (
    AbortRequests,
    CallResult,
    CoreDied,
    CoreReady,
    EngineCoreOutputs,
    EngineCoreRequest,
    FromCore,
    ResetPrefixCache,
    ShutdownCore,
    ToCore,
)
from folovllm.errors import EngineDeadError, FoloVLLMError

if TYPE_CHECKING:
    from folovllm.engine.core import EngineCore

logger = logging.getLogger(__name__)

MAX_REQUESTS_IN_FLIGHT = 4096
_SEND_HWM = 4 * MAX_REQUESTS_IN_FLIGHT  # an add and an abort for each, and room to spare
_CALL_TIMEOUT_S = 30.0
_EXIT_TIMEOUT_S = 15.0  # the core gives itself ten
_LAST_WORDS_TIMEOUT_MS = 200


class EngineOverloadedError(FoloVLLMError):
    """So many requests are in flight that no more are taken (HTTP 503)."""


class InprocClient:
    """The core in the caller's own process and thread: every `step` computes."""

    def __init__(self, core: "EngineCore") -> None:
        self._core = core

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request."""
        self._core.add_request(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Forget these; unknown ids are ignored."""
        self._core.abort_requests(request_ids)

    def step(self) -> EngineCoreOutputs:
        """Compute one step."""
        return self._core.step()

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Drop the device's prefix cache, and the connector's store too when told to; False when it is in use."""
        return self._core.reset_prefix_cache(reset_connector)

    def shutdown(self) -> None:
        """Release the model and the cache."""
        self._core.shutdown()


class ProcClient:
    """The core in a child process. Belongs to one asyncio loop; `add_request` and `abort_requests` never block."""

    def __init__(
        self,
        handle: EngineCoreHandle,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        """Bind the sockets of a core that was just started.

        `on_outputs` is called with every step's outputs, `on_death` once when the core has died unasked.
        """
        self._handle = handle
        self._on_outputs, self._on_death = on_outputs, on_death
        self._context = zmq.Context()
        self._input = self._context.socket(zmq.PUSH)
        self._input.set_hwm(_SEND_HWM)
        self._input.setsockopt(zmq.LINGER, 0)
        self._input.bind(handle.input_endpoint)
        self._output = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._output.setsockopt(zmq.LINGER, 0)
        self._output.bind(handle.output_endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[CoreReady] = self._loop.create_future()
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._call_ids = itertools.count()
        self._exited = asyncio.Event()
        self._closing = False
        self._death: EngineDeadError | None = None
        self.last_heard = time.monotonic()
        """When the core last sent something, in seconds of time.monotonic()."""
        self._sentinel = handle.process.sentinel
        self._loop.add_reader(self._sentinel, self._note_exit)
        self._reader = self._loop.create_task(self._read(), name="engine-core-outputs")
        self._reader.add_done_callback(self._note_reader_end)

    @property
    def death(self) -> EngineDeadError | None:
        """Why the core is dead; None while it lives."""
        return self._death

    async def wait_ready(self, timeout_s: float) -> CoreReady:
        """Wait until the model is loaded.

        Raises:
            EngineDeadError: the core died on the way, or took longer than `timeout_s`.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            raise EngineDeadError(f"the engine core was not ready after {timeout_s:.0f} s") from None

    def add_request(self, request: EngineCoreRequest) -> None:
        """Send a request.

        Raises:
            EngineDeadError: the core is dead.
            EngineOverloadedError: the core does not take messages fast enough.
        """
        self._send(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Ask the core to forget these; nothing to do when it is dead."""
        if self._death is not None or self._closing:
            return
        try:
            self._send(AbortRequests(request_ids))
        except EngineOverloadedError as error:
            logger.warning("aborts lost requests=%d: %s", len(request_ids), error)

    async def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Drop the device's prefix cache, and the connector's store too when told to; False when it is in use.

        Raises:
            EngineDeadError: the core is dead, or does not answer.
        """
        call_id = next(self._call_ids)
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._calls[call_id] = answer
        try:
            self._send(ResetPrefixCache(call_id, reset_connector))
            return await asyncio.wait_for(answer, _CALL_TIMEOUT_S)
        except TimeoutError:
            raise EngineDeadError(f"the engine core did not answer within {_CALL_TIMEOUT_S:.0f} s") from None
        finally:
            del self._calls[call_id]

    def give_up(self, reason: str) -> None:
        """End a core that lives, but does not work."""
        self._die(reason)
        self._handle.process.kill()

    async def shutdown(self) -> None:
        """Stop the core: ask, then terminate, then kill; every wait has a deadline. Idempotent."""
        if self._closing:
            return
        self._closing = True
        process = self._handle.process
        if not self._exited.is_set() and not (self._ready.done() and self._try_send(ShutdownCore())):
            process.terminate()  # still loading, or deaf
        for insist in (process.terminate, process.kill, None):
            try:
                await asyncio.wait_for(self._exited.wait(), _EXIT_TIMEOUT_S)
                break
            except TimeoutError:
                logger.warning("engine core does not exit pid=%s", process.pid)
                if insist is not None:
                    insist()
        self._close()

    def _close(self) -> None:
        self._loop.remove_reader(self._sentinel)
        self._reader.cancel()
        if not self._ready.done():
            self._ready.cancel()
        self._input.close()
        self._output.close()
        self._context.term()
        self._handle.close()

    def _send(self, message: ToCore) -> None:
        if self._death is not None:
            raise self._death
        if self._closing:
            raise EngineDeadError("the engine is shutting down")
        if not self._try_send(message):
            raise EngineOverloadedError(f"the engine core has {_SEND_HWM} messages to read; try again later")

    def _try_send(self, message: ToCore) -> bool:
        try:
            self._input.send(self._encoder.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    async def _read(self) -> None:
        while True:
            self._dispatch(self._decoder.decode(await self._output.recv()))

    def _note_reader_end(self, task: asyncio.Task[None]) -> None:
        # Without its reader the front end is deaf, and every request would wait for ever.
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("outputs of the engine core cannot be read", exc_info=error)
            self._die(f"outputs of the engine core cannot be read: {error}")

    def _dispatch(self, message: FromCore) -> None:
        self.last_heard = time.monotonic()
        match message:
            case EngineCoreOutputs():
                self._on_outputs(message)
            case CoreReady():
                if not self._ready.done():
                    self._ready.set_result(message)
            case CallResult():
                answer = self._calls.get(message.call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message.ok)
            case CoreDied():
                self._die(f"the engine core failed: {message.reason}")

    def _note_exit(self) -> None:
        """The sentinel says that the process is gone: read its last words, if it left any."""
        self._loop.remove_reader(self._sentinel)
        self._exited.set()
        if self._closing or self._death is not None:
            return
        self._reader.cancel()
        self._reader = self._loop.create_task(self._read_last_words(), name="engine-core-last-words")
        self._reader.add_done_callback(self._note_reader_end)

    async def _read_last_words(self) -> None:
        deadline = time.monotonic() + _LAST_WORDS_TIMEOUT_MS / 1000
        while self._death is None and await self._output.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            self._dispatch(self._decoder.decode(await self._output.recv()))
        self._handle.process.join(timeout=1)
        self._die(f"the engine core exited unexpectedly, exit code {self._handle.process.exitcode}")

    def _die(self, reason: str) -> None:
        if self._death is not None or self._closing:
            return
        # Until it is ready someone waits for it, and reports what `wait_ready` raises.
        level = logging.ERROR if self._ready.done() else logging.DEBUG
        logger.log(level, "engine core died pid=%s: %s", self._handle.process.pid, reason)
        self._death = EngineDeadError(reason)
        if not self._ready.done():
            self._ready.set_exception(self._death)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._death)
        self._on_death(self._death)
