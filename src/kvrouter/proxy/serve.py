"""The router's process: index, event subscribers and proxy, started together and ended together.

```
main thread      event loop: HTTP in, HTTP out, health checks, routing
kv-* threads     events -> index                      (SubscriberManager)
tokenize threads text -> token ids                    (Indexer's TokenizationPool)
one more thread  subscriptions and resets, in order   (they may wait for event workers)
```
The way down: the HTTP server first (requests in flight have a few seconds), then health checks, subscribers, indexer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

import aiohttp
import uvloop
from aiohttp import web

from kvrouter.config import RouterConfig
from kvrouter.errors import ConfigError, KVRouterError, ListenError
from kvrouter.indexer import Indexer
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvevents.subscriber_manager import PodEndpoint, SubscriberManager
from kvrouter.metrics.collector import EventPathCollector
from kvrouter.proxy.app import make_app
from kvrouter.proxy.forwarding import Forwarder
from kvrouter.proxy.health import HealthMonitor
from kvrouter.proxy.metrics import ProxyMetrics
from kvrouter.proxy.pods import PodRegistry
from kvrouter.proxy.policies import make_policy
from kvrouter.proxy.routing import Router

logger = logging.getLogger(__name__)

SHUTDOWN_GRACE_S: Final = 5.0
"""How long requests in flight may take to end once the router is told to."""
_BACKLOG: Final = 1024
_SUBSCRIBE_TIMEOUT_S: Final = 5.0


class ProxyServer:
    """A running proxy; an async context manager. Everything but the subscribers lives on one event loop."""

    def __init__(self, config: RouterConfig, listener: socket.socket, indexer: Indexer) -> None:
        """Prepare to serve on `listener`, which is closed at the end; `indexer` stays the caller's.

        Raises:
            ConfigError: there are no pods, or an option is not allowed.
        """
        if not config.pods:
            raise ConfigError("pods: at least one is needed")
        self._config = config
        self._listener = listener
        self.indexer: Final = indexer
        self.subscribers: Final = SubscriberManager(
            indexer.index, indexer.token_processor, concurrency=config.kv_events_config.concurrency
        )
        self.registry: Final = PodRegistry(
            config.pods, config.proxy_config, on_lost=self._on_lost, on_model=self._on_model
        )
        self.metrics: Final = ProxyMetrics()
        self.metrics.watch(self.registry.pods)
        EventPathCollector(
            self.metrics.registry, self.subscribers.counters.snapshot, self.subscribers.states, self._index_gauges
        )
        policy = make_policy(config.proxy_config)
        self.router: Final = Router(indexer, self.registry, policy, config.proxy_config, self.metrics)
        # Its queue holds a job per model learnt and one reset per pod.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="kvrouter-subscriptions")
        self._lock = threading.Lock()
        self._resets_due: set[str] = set()  # pods whose reset has not begun; protected by _lock
        self._session: aiohttp.ClientSession | None = None
        self._health: HealthMonitor | None = None
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        config = self._config.proxy_config
        try:
            self.subscribers.start()
            for pod in self._config.pods:
                if pod.model is not None:
                    self._on_model(pod.name, pod.model)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=config.keepalive_timeout)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
            self._health = HealthMonitor(self.registry, self._session, config)
            await self._health.start()
            forwarder = Forwarder(self._session, self.router, self.registry, self._health, config, self.metrics)
            app = make_app(self.registry, self.router, forwarder, config, self.metrics)
            # A client that leaves cancels its handler, which drops the connection to the pod.
            self._runner = web.AppRunner(
                app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_GRACE_S
            )
            await self._runner.setup()
            await self._subscriptions_made()
            await web.SockSite(self._runner, self._listener, backlog=_BACKLOG).start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def port(self) -> int:
        """The port served."""
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """End everything, in the order of the module's docstring. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._health is not None:
            await self._health.close()
        if self._session is not None:
            await self._session.close()
        loop = asyncio.get_running_loop()
        # The job in hand ends by the deadline of the event worker it may wait for; the others are dropped.
        await loop.run_in_executor(None, lambda: self._background.shutdown(cancel_futures=True))
        await loop.run_in_executor(None, self.subscribers.close)
        self._listener.close()

    async def _subscriptions_made(self) -> None:
        """Wait, not for long, until all that was asked for has been done: then no event is missed for want of time."""
        done = asyncio.get_running_loop().run_in_executor(self._background, lambda: None)
        try:
            async with asyncio.timeout(_SUBSCRIBE_TIMEOUT_S):
                await done
        except TimeoutError:
            logger.warning("event=subscriptions_late: serving without them")

    def _on_model(self, name: str, model: str) -> None:
        pod = self.registry[name].config
        if pod.events_endpoint is None:
            return
        endpoint = PodEndpoint(name, model, pod.events_endpoint, pod.replay_endpoint)
        self._run_in_background(name, lambda: self.subscribers.add(endpoint))

    def _on_lost(self, name: str) -> None:
        self.router.forget(name)
        if self.registry[name].config.events_endpoint is None:
            return
        with self._lock:
            if name in self._resets_due:
                return
            self._resets_due.add(name)
        self._run_in_background(name, lambda: self._reset(name))

    def _index_gauges(self) -> dict[str, int]:
        index = self.indexer.index
        return dataclasses.asdict(index.stats()) if isinstance(index, InMemoryIndex) else {}

    def _reset(self, name: str) -> None:
        with self._lock:
            self._resets_due.discard(name)
        if name in self.subscribers.pods():  # it may not have been listened to yet
            self.subscribers.reset_pod(name)

    def _run_in_background(self, name: str, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except KVRouterError as error:  # the pod is routed to all the same, by what else is known of it
                logger.error("pod=%s event=subscription_failed error=%s", name, error)
            except Exception:  # thread boundary: the same, and the next job is not held up
                logger.exception("pod=%s event=subscription_failed", name)

        self._background.submit(run)


def run_router(
    config: RouterConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; call it from the main thread.

    Args:
        config: the whole configuration.
        host: address to listen on.
        port: 0 takes a free one.
        on_ready: called with the port once every pod has been checked and requests are taken.

    Raises:
        ListenError: the address cannot be listened on, for example because the port is in use.
        ConfigError: an option is not allowed.
        TokenizerLoadError: a tokenizer cannot be loaded.
    """
    with open_listener(host, port) as listener, Indexer(config) as indexer:
        uvloop.run(_serve(ProxyServer(config, listener, indexer), host, on_ready))


def open_listener(host: str, port: int) -> socket.socket:
    """Return a TCP socket that listens on an address.

    Raises:
        ListenError: the port is in use or not allowed, or the host is not one of this machine's.
    """
    if not 0 <= port <= 65535:
        raise ListenError(f"cannot listen on {host}:{port}: a port is in 0..65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        in_use = error.errno == errno.EADDRINUSE
        why = "the port is in use; choose another, or 0 for any" if in_use else str(error)
        raise ListenError(f"cannot listen on {host}:{port}: {why}") from error
    return listener


async def _serve(server: ProxyServer, host: str, on_ready: Callable[[int], None] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with server:
        logger.info("event=listening host=%s port=%d", host, server.port)
        if on_ready is not None:
            on_ready(server.port)
        await stop.wait()  # for as long as nobody ends the router
