"""The server process: socket, engine, signals, drain.

bind -> load the model -> listen -> serve
  -- SIGTERM or SIGINT -->  drain: the listener is closed, what runs is finished (deadline), exit code 0
  -- another signal    -->  what runs is given up, exit code 128 + signal
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
import uvloop

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.entrypoints.openai.middleware import RequestGate
from folovllm.entrypoints.openai.routes import build_app
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.serving import OpenAIServing
from folovllm.errors import ConfigError, FoloVLLMError

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 30
_USAGE_ERROR = 2
_EXIT_BY_SIGNAL = 128


class PortInUseError(ConfigError):
    """The address to listen on is taken, or is none of this machine's."""


def run_server(
    args: EngineArgs, options: ServerOptions, *, ready_callback: Callable[[int], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; to be called in the main thread, as the last thing a process does.

    `ready_callback` is given the port once requests are answered.

    Raises:
        SystemExit: 2 with one line in the log when the port is taken, an option is wrong or the model cannot be loaded;
            128 + signal when a second signal cut the drain short.
    """
    try:
        options.check()
        sock = bind(options.host, options.port)
        process = _Process(args, options, sock, ready_callback)
        with contextlib.closing(sock), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(process.run())
        if process.cut_short_by is not None:
            raise SystemExit(_EXIT_BY_SIGNAL + process.cut_short_by)
    except FoloVLLMError as error:
        logger.error("%s", error)
        raise SystemExit(_USAGE_ERROR) from None


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address; it does not listen yet, so clients see no server before it can serve.

    Raises:
        PortInUseError: the address is taken or not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from error
    return sock


def _bind_error(host: str, port: int, error: OSError) -> PortInUseError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(f"port {port} on {host} is in use; stop what listens there, or choose another port")
    return PortInUseError(f"cannot listen on {host}:{port}: {error.strerror}")


class _Server(uvicorn.Server):
    """uvicorn, with signals left to the process: it would raise them again at the end, past our own cleaning up."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_started()


class _Process:
    """One run of the server."""

    def __init__(
        self,
        args: EngineArgs,
        options: ServerOptions,
        sock: socket.socket,
        ready_callback: Callable[[int], None] | None,
    ) -> None:
        self._args, self._options, self._sock = args, options, sock
        self._ready_callback = ready_callback
        self._server: _Server | None = None
        self.cut_short_by: int | None = None
        """The signal that ended the drain before its time."""

    async def run(self) -> None:
        """Load, serve, drain, stop."""
        loop = asyncio.get_running_loop()
        loading = loop.create_task(AsyncLLM.from_engine_args(self._args))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number, loading)
        try:
            engine = await loading
        except asyncio.CancelledError:
            logger.info("stopped while loading")
            return
        try:
            await self._serve(engine)
        finally:
            await engine.shutdown()

    async def _serve(self, engine: AsyncLLM) -> None:
        name = self._args.served_model_name or self._args.model
        serving = OpenAIServing(engine, name, self._options.tool_call_parser)
        app = RequestGate(build_app(serving, self._args.model), self._options.api_key)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=self._options.drain_timeout,
        )
        self._server = _Server(config, self._on_started)
        host, port = self._sock.getsockname()[:2]
        try:
            await self._server.serve(sockets=[self._sock])
        except OSError as error:  # someone began to listen there while the model was loading
            raise _bind_error(host, port, error) from error

    def _on_signal(self, number: int, loading: "asyncio.Task[AsyncLLM]") -> None:
        if self._server is None:
            loading.cancel()
        elif not self._server.should_exit:
            logger.info("signal=%s: finishing requests, at most %s s", number, self._options.drain_timeout)
            self._server.should_exit = True
        else:
            logger.warning("signal=%s: giving up what runs", number)
            self.cut_short_by, self._server.force_exit = number, True

    def _on_started(self) -> None:
        host, port = self._sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if self._sock.family == socket.AF_INET6 else f"http://{host}:{port}"
        logger.info("serving model=%s url=%s", self._args.served_model_name or self._args.model, url)
        if self._ready_callback is not None:
            self._ready_callback(port)
