"""Servers that hang: a call ends by its deadline, and what comes late disturbs nobody.

That these tests end at all is what they test: nothing here ever answers.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from tests.flexkv.remote_servers import MooncakeServer, eventually, require_backend, s3_url, soon

from flexkv.common.config import ResilienceConfig
from flexkv.storage.remote.base import RemoteStore, RemoteStoreError, RemoteTimeoutError
from flexkv.storage.remote.factory import open_backend, open_remote_store
from flexkv.storage.remote.keys import block_key
from flexkv.storage.remote.mooncake import MooncakeStore
from flexkv.storage.remote.resilient import ResilientStore

BLOCK_BYTES = 100_000
KEYS = [block_key("hanging", "m", bytes([i])) for i in range(3)]
SHORT_S = 0.1


def blocks(count: int = 3) -> list[np.ndarray]:
    return [np.full(BLOCK_BYTES, i, np.uint8) for i in range(count)]


@contextmanager
def silent_server() -> Iterator[int]:
    """Give the port of a socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


class DrippingServer:
    """Answers everything with `beginning`, and then a byte now and then, for ever."""

    def __init__(self, beginning: bytes) -> None:
        self._beginning = beginning
        self._stopping = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._drip, args=(connection,)))
            self._threads[-1].start()

    def _drip(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)  # an answer that comes before its question is an error of another kind
                connection.sendall(self._beginning)
                while not self._stopping.wait(0.01):
                    connection.sendall(b"x")
            except OSError:
                pass

    def close(self) -> None:
        self._stopping.set()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join()


def urls(kind: str, port: int) -> str:
    return {
        "redis": f"redis://127.0.0.1:{port}/0",
        "redis-auth": f"redis://user:password@127.0.0.1:{port}/3",
        "rediss": f"rediss://127.0.0.1:{port}/0",
        "s3": s3_url(f"http://127.0.0.1:{port}"),
        "mooncake": f"mooncake://127.0.0.1:{port}?segment_mb=0",
    }[kind]


def assert_times_out(store: RemoteStore) -> None:
    for call in (
        lambda: store.get(KEYS, blocks(), soon(SHORT_S)),
        lambda: store.put(KEYS, blocks(), soon(SHORT_S)),
        lambda: store.exists(KEYS, soon(SHORT_S)),
        lambda: store.delete(KEYS, soon(SHORT_S)),
    ):
        with pytest.raises(RemoteTimeoutError) as caught:
            call()
        assert not caught.value.done.any()
    assert not store.ping(soon(SHORT_S))


@pytest.mark.parametrize("kind", ["redis", "redis-auth", "rediss", "s3", "mooncake"])
def test_a_server_that_never_answers_costs_the_deadline(kind: str) -> None:
    require_backend("redis" if kind.startswith("redis") else kind)
    with silent_server() as port, open_backend(urls(kind, port), block_bytes=BLOCK_BYTES) as store:
        assert_times_out(store)


REPLIES = {
    "redis": b"+OK\r\n+OK\r\n$100064\r\n",
    "s3": b"HTTP/1.1 200 OK\r\nLast-Modified: Sat, 01 Jan 2028 00:00:00 GMT\r\nContent-Length: 100064\r\n\r\n",
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_server_that_sends_a_byte_now_and_then_costs_the_deadline(kind: str) -> None:
    require_backend(kind)
    server = DrippingServer(REPLIES[kind])
    try:
        with open_backend(urls(kind, server.port), block_bytes=BLOCK_BYTES) as store:
            for _ in range(2):
                with pytest.raises(RemoteTimeoutError):
                    store.get(KEYS[:1], blocks(1), soon(SHORT_S))
    finally:
        server.close()


def test_the_wrapper_makes_misses_of_a_hanging_server_and_then_leaves_it_alone() -> None:
    require_backend("redis")
    config = ResilienceConfig(failure_limit=2, cooldown_s=1e6)
    with (
        silent_server() as port,
        open_remote_store(urls("redis", port), block_bytes=BLOCK_BYTES, resilience=config) as store,
    ):
        for _ in range(2):
            assert not store.get(KEYS, blocks(), soon(SHORT_S)).any()
        assert (store.stats().timeouts, store.stats().breaker_state) == (2, "open")
        assert not store.get(KEYS, blocks(), float("inf")).any(), "this would wait for ever"
        assert store.stats().rejected == 1


def test_threads_that_wait_for_a_connection_keep_their_deadline() -> None:
    require_backend("redis")
    with silent_server() as port:
        url = f"redis://127.0.0.1:{port}/0?max_connections=1"
        with open_backend(url, block_bytes=BLOCK_BYTES) as store:
            errors: list[Exception] = []

            def ask() -> None:
                try:
                    store.exists(KEYS, soon(SHORT_S))
                except RemoteTimeoutError as error:
                    errors.append(error)

            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(errors) == 6


@pytest.fixture(scope="module")
def mooncake_store() -> Iterator[MooncakeStore]:
    require_backend("mooncake")
    with ExitStack() as stack:
        server = MooncakeServer()
        stack.callback(server.kill)
        store = stack.enter_context(open_backend(server.url, block_bytes=BLOCK_BYTES))
        assert isinstance(store, MooncakeStore)
        yield store


def client_pid(store: MooncakeStore) -> int:
    assert store._client is not None
    return store._client._process.pid


def test_what_a_stopped_mooncake_client_answers_late_is_dropped(mooncake_store: MooncakeStore) -> None:
    assert mooncake_store.put(KEYS, blocks(), soon()).all()
    pid = client_pid(mooncake_store)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert_times_out(mooncake_store)
    finally:
        os.kill(pid, signal.SIGCONT)
    # Until the late put has ended, one of the same keys may be refused, and a get may find nothing.
    store = ResilientStore(mooncake_store, ResilienceConfig(cooldown_s=0.05))
    eventually(lambda: store.put(KEYS, blocks(), soon()).all())
    buffers = [np.full(BLOCK_BYTES, 99, np.uint8) for _ in KEYS]
    eventually(lambda: store.get(KEYS, buffers, soon()).all())
    assert [set(buffer.tolist()) for buffer in buffers] == [{0}, {1}, {2}]
    assert client_pid(mooncake_store) == pid


def test_a_mooncake_client_that_dies_is_started_again(mooncake_store: MooncakeStore) -> None:
    assert mooncake_store.ping(soon())
    pid = client_pid(mooncake_store)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RemoteStoreError, match="client process has ended; "):
        mooncake_store.exists(KEYS, soon())
    store = ResilientStore(mooncake_store, ResilienceConfig(cooldown_s=0.05))
    eventually(lambda: store.put(KEYS, blocks(), soon()).all() and store.get(KEYS, blocks(), soon()).all())
    assert client_pid(mooncake_store) != pid
