"""The engine core in a process of its own. Mirrors vllm/v1/engine/core.py (EngineCoreProc).

    front end (binds)                           engine core process (connects)
    PUSH input_endpoint   -- ToCore, msgpack -->  thread "core-input" --> inbox (bounded) --> main thread: steps
    PULL output_endpoint  <- FromCore, msgpack -------------------------------------------- main thread
    stdin pipe, SIGTERM   ---------------->       thread "core-watchdog" --> stop (see core_watchdog)

The process ends on ShutdownCore, SIGTERM, or when its parent is gone, however that ended. What takes seconds to import
(torch) is imported under the watchdog's eyes, not with this module.
"""

import argparse
import gc
import logging
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core_watchdog import CoreWatchdog
from folovllm.engine.messages import (
    AbortRequests,
    CallResult,
    CoreDied,
    CoreReady,
    EngineCoreRequest,
    FromCore,
    ResetPrefixCache,
    ShutdownCore,
    ToCore,
)
from folovllm.errors import FoloVLLMError, InvalidRequestError
from kvblocks.errors import KVBlocksError

if TYPE_CHECKING:
    from folovllm.engine.core import EngineCore

logger = logging.getLogger(__name__)

BuildCore = Callable[[EngineArgs], "EngineCore"]
"""Loads the model."""

_INBOX_SIZE = 1024  # when full the input thread waits, then ZMQ's queues fill, then the front end's send fails
_OUTPUT_HWM = 10_000
_POLL_MS = 1000
_LINGER_MS = 2000
_EXIT_GRACE_S = 10.0


class EngineCoreProc:
    """The process's main loop around an EngineCore; `run` returns when the process shall end."""

    def __init__(self, input_endpoint: str, output_endpoint: str) -> None:
        self._context = zmq.Context()
        # Owned by the main thread:
        self._output = self._context.socket(zmq.PUSH)
        self._output.setsockopt(zmq.LINGER, _LINGER_MS)
        self._output.set_hwm(_OUTPUT_HWM)
        self._output.connect(output_endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        # Owned by the input thread once it runs:
        self._input = self._context.socket(zmq.PULL)
        self._input.setsockopt(zmq.LINGER, 0)
        self._input.connect(input_endpoint)
        self._inbox: queue.Queue[ToCore] = queue.Queue(_INBOX_SIZE)
        self._stop = threading.Event()
        self._input_thread = threading.Thread(target=self._read_input, name="core-input", daemon=True)

    def run(self, build_core: Callable[[], "EngineCore"]) -> int:
        """Build the core, serve it until told to stop, release it; returns the exit code.

        A failure is the front end's to report: it gets the reason as CoreDied.
        """
        core = None
        try:
            self._input_thread.start()
            core = build_core()
            gc.freeze()  # the model and all imports stay: a collection in the middle of a step need not look at them
            self._send(CoreReady(context_len=core.config.model_config.context_len, pool_tokens=core.pool_tokens))
            self._serve(core)
            return 0
        except Exception as error:  # the process's outermost boundary
            # An option or a checkpoint that is wrong needs its message, which the front end shows, and no traceback.
            is_users = core is None and isinstance(error, FoloVLLMError | KVBlocksError)
            logger.log(logging.DEBUG if is_users else logging.ERROR, "engine core failed", exc_info=True)
            self._send(CoreDied(f"{type(error).__name__}: {error}"))
            return 1
        finally:
            self._stop.set()
            if core is not None:
                core.shutdown()
            self._output.close()
            self._context.term()  # wakes the input thread, which closes its socket
            self._input_thread.join(_EXIT_GRACE_S)

    def stop(self) -> None:
        """End the loop after the step under way; any thread may call it."""
        self._stop.set()
        try:
            self._inbox.put_nowait(ShutdownCore())  # wakes an idle loop; a full inbox needs no waking
        except queue.Full:
            logger.debug("inbox full while stopping")

    def _serve(self, core: "EngineCore") -> None:
        while not self._stop.is_set():
            if not core.has_work:
                self._handle(core, self._inbox.get())
            while not self._inbox.empty():
                self._handle(core, self._inbox.get())
            if core.has_work and not self._stop.is_set():
                self._send(core.step())

    def _handle(self, core: "EngineCore", message: ToCore) -> None:
        match message:
            case EngineCoreRequest():
                try:
                    core.add_request(message)
                except InvalidRequestError as error:
                    logger.error("request refused request_id=%s: %s", message.request_id, error)
            case AbortRequests():
                core.abort_requests(message.request_ids)
            case ResetPrefixCache():
                self._send(CallResult(message.call_id, core.reset_prefix_cache(message.reset_connector)))
            case ShutdownCore():
                self._stop.set()

    def _send(self, message: FromCore) -> None:
        payload = self._encoder.encode(message)
        # A front end that does not read stalls the core, which is right; one that is gone stops it.
        while not self._output.poll(_POLL_MS, zmq.POLLOUT):
            if self._stop.is_set():
                logger.warning("front end does not read; dropped %s", type(message).__name__)
                return
        self._output.send(payload)

    def _read_input(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToCore)
        try:
            while True:
                payload = self._input.recv()
                try:
                    self._put(decoder.decode(payload))
                except (msgspec.MsgspecError, InvalidRequestError) as error:
                    logger.error("message from the front end cannot be read bytes=%d: %s", len(payload), error)
        except zmq.ContextTerminated:
            logger.debug("input closed")  # the main thread is done
        except Exception:  # a thread's boundary: a core that is deaf must not live on
            logger.exception("input thread failed")
            self.stop()
        finally:
            self._input.close()

    def _put(self, message: ToCore) -> None:
        while not self._stop.is_set():
            try:
                self._inbox.put(message, timeout=_POLL_MS / 1000)
            except queue.Full:
                continue
            return


def import_core() -> BuildCore:
    """Import what computes, which takes seconds; returns what builds a core."""
    from folovllm.engine.core import EngineCore

    return lambda args: EngineCore(args.resolve())


def main(argv: Sequence[str] | None = None, load: Callable[[], BuildCore] = import_core) -> int:
    """Command line of the process: the first line of stdin is the EngineArgs as JSON, then stdin stays open.

    `load` imports the core and returns its builder. To be called in the main thread.
    """
    parser = argparse.ArgumentParser(description="Engine core process; started by the front end.")
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--runtime-dir", type=Path, required=True)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    watchdog = CoreWatchdog(options.runtime_dir)
    try:
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            logger.error("engine core stops reason=front-end-gone")
            return 1
        watchdog.start()
        args = EngineArgs.from_options(msgspec.json.decode(line))
        build_core = load()
        proc = EngineCoreProc(options.input, options.output)
        watchdog.attach(proc.stop)
        return proc.run(lambda: build_core(args))
    finally:
        watchdog.finish()


if __name__ == "__main__":
    sys.exit(main())
