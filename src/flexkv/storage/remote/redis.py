"""Blocks in a Redis or Valkey server, one string per block.

A batch goes over one connection as a pipeline of GETs or SETs, in windows of at most `window_mb`, so that neither side
has to hold more than that at once. One GET per block, not one MGET for all: between them the server serves others.
`resp.py` says which bytes are copied. At most `max_connections` connections; who finds none free waits for one until
the deadline. Resolving the server's name is the one wait that the deadline does not end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

from flexkv.errors import ConfigError
from flexkv.storage.remote.base import (
    BoolArray,
    RemoteBackend,
    RemoteStoreError,
    RemoteTimeoutError,
    time_left,
)
from flexkv.storage.remote.resp import Reply, RespWire, command
from flexkv.storage.remote.url import RemoteUrl
from flexkv.storage.remote.value import HEADER_BYTES, is_intact, make_header, value_bytes

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError:
    _is_installed = False
else:
    _is_installed = True

DEFAULT_PORT: Final = 6379
_MIB: Final = 2**20
_KEY_WINDOW: Final = 1024
"""Commands without payload sent ahead of their replies."""


class _Parser(RespWire):
    """The wire as redis-py's connections know it: they connect and authenticate through their parser."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__()

    def on_connect(self, connection: Any) -> None:
        """Take the socket of a connection that is being opened."""
        self.attach(connection._sock)

    def on_disconnect(self) -> None:
        """Forget the socket."""
        self.detach()

    def read_response(self, disable_decoding: bool = False, timeout: object = None) -> Reply | Exception:
        """Return the reply to a command of the handshake, text undecoded; the connection raises what is an error."""
        reply = self.read_reply()
        if not isinstance(reply, RemoteStoreError):
            return reply
        error = redis.ResponseError(str(reply))
        error.__cause__ = reply
        return error


class RedisStore(RemoteBackend):
    """A server of its own kind behind a pool of connections."""

    kind = "redis"

    def __init__(
        self,
        make_connection: Callable[[], Any],
        *,
        max_connections: int = 8,
        window_bytes: int = 32 * _MIB,
        ttl_ms: int | None = None,
    ) -> None:
        """Use connections of redis-py, made when they are needed.

        Args:
            make_connection: returns a connection of redis-py that is not yet connected.
            max_connections: how many at once.
            window_bytes: payload that is under way on one connection.
            ttl_ms: after so many milliseconds the server forgets a block; None for never.
        """
        super().__init__()
        self._make_connection = make_connection
        self._window_bytes = window_bytes
        self._ttl_ms = ttl_ms
        self._may_connect = threading.BoundedSemaphore(max_connections)
        self._lock = threading.Lock()
        self._idle: list[Any] = []  # protected by _lock

    @classmethod
    def from_url(cls, url: RemoteUrl, block_bytes: int) -> Self:
        """Open `redis://[user:password@]host[:port][/db]`, `rediss://` the same over TLS, or `unix:///path?db=n`.

        Options: max_connections, window_mb, ttl_s; of rediss also ca_certs, certfile, keyfile and verify.

        Raises:
            ConfigError: not such a URL, or redis-py is not installed.
        """
        if not _is_installed:
            raise ConfigError(f"{url.scheme}:// needs the package redis; install kvstrata[redis]")
        options = url.options()
        arguments: dict[str, Any] = {"username": url.username or None, "password": url.password or None}
        if url.scheme == "unix":
            url.require(url.host == "" and url.path not in ("", "/"), "names no socket", "unix:///run/redis.sock?db=0")
            arguments |= {"path": url.path, "db": options.integer("db", 0, 0, 2**31 - 1)}
        else:
            example = f"{url.scheme}://cache.local:{DEFAULT_PORT}/0"
            url.require(url.host != "", "names no host", example)
            database = url.path.removeprefix("/") or "0"
            url.require(database.isascii() and database.isdigit(), "names a database that is no number", example)
            arguments |= {"host": url.host, "port": url.port or DEFAULT_PORT, "db": int(database)}
        if url.scheme == "rediss":
            verify = options.flag("verify", default=True)
            arguments |= {
                "ssl_cert_reqs": "required" if verify else "none",
                "ssl_check_hostname": verify,
                "ssl_ca_certs": options.text("ca_certs"),
                "ssl_certfile": options.text("certfile"),
                "ssl_keyfile": options.text("keyfile"),
            }
        max_connections = options.integer("max_connections", 8, 1, 1024)
        window_mb = options.integer("window_mb", 32, 1, 1024)
        ttl_s = options.integer("ttl_s", 0, 0, 10 * 365 * 86400)
        options.finish()
        return cls(
            _connection_maker(url.scheme, arguments),
            max_connections=max_connections,
            window_bytes=window_mb * _MIB,
            ttl_ms=ttl_s * 1000 or None,
        )

    def close(self) -> None:
        """See `RemoteStore`."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _exists(self, keys: Sequence[str], done: BoolArray, deadline: float) -> None:
        with self._wire(deadline) as wire:
            for i, reply in _ask(wire, [command(b"EXISTS", key.encode()) for key in keys]):
                done[i] = reply == 1

    def _get(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        refused: RemoteStoreError | None = None
        header = bytearray(HEADER_BYTES)
        with self._wire(deadline) as wire:
            for window in self._windows(views):
                wire.send([b"".join(command(b"GET", keys[i].encode()) for i in window)])
                for i in window:
                    outcome = wire.read_value(memoryview(header), views[i])
                    if isinstance(outcome, RemoteStoreError):
                        # A key that holds something else than a string is a bad value, not a bad server.
                        if "WRONGTYPE" not in str(outcome):
                            refused = refused or outcome
                            continue
                        outcome = False
                    done[i] = outcome is True and is_intact(header, keys[i], views[i])
                    if outcome is not None and not done[i]:
                        self._count_bad_value()
        if refused is not None:
            raise refused

    def _put(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        refused: RemoteStoreError | None = None
        with self._wire(deadline) as wire:
            for window in self._windows(views):
                for i in window:
                    self._send_set(wire, keys[i], views[i])
                for i in window:
                    reply = wire.read_reply()
                    done[i] = reply == b"OK"
                    if isinstance(reply, RemoteStoreError) and "OOM" not in str(reply):  # full is not broken
                        refused = refused or reply
        if refused is not None:
            raise refused

    def _delete(self, keys: Sequence[str], deadline: float) -> None:
        with self._wire(deadline) as wire:
            for _ in _ask(wire, [command(b"UNLINK", key.encode()) for key in keys]):
                pass

    def _ping(self, deadline: float) -> None:
        with self._wire(deadline) as wire:
            for _ in _ask(wire, [command(b"PING")]):
                pass

    def _send_set(self, wire: RespWire, key: str, payload: memoryview) -> None:
        header = make_header(key, payload)
        name = key.encode()
        size = value_bytes(payload.nbytes)
        if self._ttl_ms is None:
            begin = command(b"SET", name, last_bytes=size)
        else:
            begin = command(b"PSETEX", name, b"%d" % self._ttl_ms, last_bytes=size)
        wire.send([begin + header, payload, b"\r\n"])

    def _windows(self, views: list[memoryview]) -> Iterator[range]:
        """Cut a batch into runs of at most `window_bytes`, or of one block."""
        begin = num_bytes = 0
        for i, view in enumerate(views):
            if i > begin and num_bytes + view.nbytes > self._window_bytes:
                yield range(begin, i)
                begin, num_bytes = i, 0
            num_bytes += view.nbytes
        yield range(begin, len(views))

    @contextmanager
    def _wire(self, deadline: float) -> Iterator[RespWire]:
        """Lend a connection; one on which anything fails is closed, as replies may still be on their way."""
        if not self._may_connect.acquire(timeout=time_left(deadline)):
            raise RemoteTimeoutError("all connections to the Redis server are busy")
        connection = None
        try:
            connection = self._take_connection(deadline)
            yield _wire_of(connection)
        except BaseException as error:
            if connection is not None:
                connection.disconnect()
            meaning = _translated(error, deadline)
            if meaning is error:
                raise
            raise meaning from error
        else:
            self._give_back(connection)
        finally:
            self._may_connect.release()

    def _take_connection(self, deadline: float) -> Any:
        with self._lock:
            connection = self._idle.pop() if self._idle else self._make_connection()
        wire = _wire_of(connection)
        wire.deadline = deadline
        if wire.is_attached and wire.can_read():  # nothing was asked: the server has hung up
            connection.disconnect()
        if not wire.is_attached:
            connection.socket_connect_timeout = connection.socket_timeout = time_left(deadline)
            connection.connect()
        return connection

    def _give_back(self, connection: Any) -> None:
        with self._lock:
            if not self._closed.is_set():
                self._idle.append(connection)
                return
        connection.disconnect()


def _connection_maker(scheme: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    classes = {"redis": redis.Connection, "rediss": redis.SSLConnection, "unix": redis.UnixDomainSocketConnection}
    connection_class: Callable[..., Any] = classes[scheme]

    def make() -> Any:
        # Retries are the wrapper's business.
        return connection_class(parser_class=_Parser, protocol=2, retry=Retry(NoBackoff(), 0), **arguments)

    return make


def _wire_of(connection: Any) -> RespWire:
    wire = connection._parser
    assert isinstance(wire, RespWire)
    return wire


def _ask(wire: RespWire, commands: list[bytes]) -> Iterator[tuple[int, Reply]]:
    """Send small commands, and give their replies with their positions.

    Raises:
        RemoteStoreError: one of them was refused; raised once all are read.
    """
    refused: RemoteStoreError | None = None
    for begin in range(0, len(commands), _KEY_WINDOW):
        window = commands[begin : begin + _KEY_WINDOW]
        wire.send([b"".join(window)])
        for i in range(len(window)):
            reply = wire.read_reply()
            if isinstance(reply, RemoteStoreError):
                refused = refused or reply
            else:
                yield begin + i, reply
    if refused is not None:
        raise refused


def _translated(error: BaseException, deadline: float) -> BaseException:
    """Return what a failure of the socket or of redis-py means to the caller; other errors as they are."""
    if isinstance(error.__cause__, RemoteStoreError):  # raised by the parser, passed on by redis-py
        return error.__cause__
    if isinstance(error, RemoteStoreError):
        return error
    if isinstance(error, (TimeoutError, redis.TimeoutError)) or (
        isinstance(error, (OSError, redis.ConnectionError)) and time.monotonic() >= deadline
    ):
        return RemoteTimeoutError(f"the Redis server has not answered in time: {error}")
    if isinstance(error, (OSError, redis.RedisError)):
        return RemoteStoreError(f"the connection to the Redis server failed: {error}", is_transient=True)
    return error
