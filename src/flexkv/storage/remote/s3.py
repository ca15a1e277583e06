"""Blocks in an object store that speaks S3, one object per block.

    s3://bucket/prefix     ->  object  prefix/<namespace>/<fingerprint>/<hash>

Requests run on the event loop of one thread, at most `concurrency` of them; obstore does their work outside Python.
At the deadline they are cancelled, which closes their connections. Two copies of a payload remain: on a put, header
and payload become one body; on a get, the body, which obstore owns, is verified and then copied to the caller's buffer.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Final, Self

import numpy as np

from flexkv.errors import ConfigError
from flexkv.storage.remote.base import (
    BoolArray,
    RemoteBackend,
    RemoteStoreError,
    RemoteTimeoutError,
    time_left,
)
from flexkv.storage.remote.url import RemoteUrl
from flexkv.storage.remote.value import HEADER_BYTES, is_intact, make_header, value_bytes

try:
    import obstore
    from obstore import exceptions as obstore_exceptions
    from obstore import store as obstore_stores
except ImportError:
    _is_installed = False
else:
    _is_installed = True

_JOIN_S: Final = 5.0
_DELETE_BATCH: Final = 1000
"""Keys of one DeleteObjects request, as S3 limits it."""

Request = Callable[[int], Coroutine[Any, Any, object]]
"""Asks for one entry of a batch; returns what the caller's thread has to look at."""


class S3Store(RemoteBackend):
    """A bucket, or a prefix of one."""

    kind = "s3"

    def __init__(self, store: Any, *, concurrency: int = 16) -> None:
        """Use `store`, an object store of obstore without retries, for `concurrency` requests at once."""
        super().__init__()
        self._store = store
        self._lock = threading.Lock()  # nothing is submitted once `close` has begun
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(concurrency)
        self._thread = threading.Thread(target=self._run_loop, name="flexkv-remote-s3", daemon=True)
        self._thread.start()

    @classmethod
    def from_url(cls, url: RemoteUrl, block_bytes: int) -> Self:
        """Open `s3://bucket[/prefix]`.

        Options: endpoint, region, access_key_id, secret_access_key, session_token (each else from the AWS_* variables),
        anonymous, virtual_hosted, concurrency, connect_timeout_s, request_timeout_s.

        Raises:
            ConfigError: not such a URL, an option S3 does not have, or obstore is not installed.
        """
        if not _is_installed:
            raise ConfigError("s3:// needs the package obstore; install kvstrata[s3]")
        example = "s3://bucket/prefix?region=eu-central-1"
        url.require(url.host != "" and url.port is None, "names no bucket", example)
        url.require(url.username is None, "has a user before its bucket; keys go into the options", example)
        options = url.options()
        names = ("endpoint", "region", "access_key_id", "secret_access_key", "session_token")
        config: dict[str, Any] = {name: value for name in names if (value := options.text(name)) is not None}
        config["skip_signature"] = options.flag("anonymous", default=False)
        config["virtual_hosted_style_request"] = options.flag("virtual_hosted", default=False)
        concurrency = options.integer("concurrency", 16, 1, 1024)
        client = {
            "connect_timeout": timedelta(seconds=options.integer("connect_timeout_s", 5, 1, 600)),
            "timeout": timedelta(seconds=options.integer("request_timeout_s", 60, 1, 3600)),
            "allow_http": config.get("endpoint", "").startswith("http://"),
        }
        options.finish()
        try:
            store = obstore_stores.S3Store(
                url.host,
                prefix=url.path.strip("/") or None,
                client_options=client,  # type: ignore[arg-type]
                retry_config={"max_retries": 0},
                **config,
            )
        except (obstore_exceptions.BaseError, ValueError) as error:
            raise ConfigError(f"remote URL {url.shown!r} is refused: {_first_line(error)}") from error
        return cls(store, concurrency=concurrency)

    def close(self) -> None:
        """See `RemoteStore`. Takes up to 5 s when requests do not end."""
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)

    def _exists(self, keys: Sequence[str], done: BoolArray, deadline: float) -> None:
        async def ask(i: int) -> object:
            await obstore.head_async(self._store, keys[i])
            return True

        def found(i: int, _: object) -> None:
            done[i] = True

        self._for_each(len(keys), ask, found, deadline)

    def _get(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        async def fetch(i: int) -> object:
            response = await obstore.get_async(self._store, keys[i])
            if response.meta["size"] != value_bytes(views[i].nbytes):
                return None
            return await response.bytes_async()

        def take(i: int, body: object) -> None:
            done[i] = body is not None and _copy_value(memoryview(body), keys[i], views[i])  # type: ignore[arg-type]
            if not done[i]:
                self._count_bad_value()

        self._for_each(len(keys), fetch, take, deadline)

    def _put(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        async def send(i: int) -> object:
            # The body is a copy: a request that is cancelled may look at it for a moment longer than this call lasts.
            body = b"".join((make_header(keys[i], views[i]), views[i]))
            try:
                return await obstore.put_async(self._store, keys[i], body, use_multipart=False)
            except FileNotFoundError as error:  # for a read this would be a miss
                raise RemoteStoreError(f"the bucket does not exist: {_first_line(error)}") from error

        def sent(i: int, _: object) -> None:
            done[i] = True

        self._for_each(len(keys), send, sent, deadline)

    def _delete(self, keys: Sequence[str], deadline: float) -> None:
        batches = [list(keys[i : i + _DELETE_BATCH]) for i in range(0, len(keys), _DELETE_BATCH)]

        async def remove(i: int) -> object:
            await obstore.delete_async(self._store, batches[i])
            return None

        self._for_each(len(batches), remove, lambda i, _: None, deadline)

    def _ping(self, deadline: float) -> None:
        async def ask(_: int) -> object:
            return await obstore.head_async(self._store, "ping")  # there is none: not found is an answer

        self._for_each(1, ask, lambda i, _: None, deadline)

    def _for_each(self, num_keys: int, ask: Request, take: Callable[[int, object], None], deadline: float) -> None:
        """Ask for every entry; `take` gets the answers on this thread, as they come.

        An answer of `FileNotFoundError` is nobody's failure unless `take` thinks so: entries that are absent.
        """
        answers: queue.SimpleQueue[tuple[int, object] | None] = queue.SimpleQueue()
        batch = self._submit(self._ask_all(num_keys, ask, answers))
        batch.add_done_callback(lambda _: answers.put(None))
        failure: BaseException | None = None
        try:
            for _ in range(num_keys):
                answer = answers.get(timeout=time_left(deadline))
                if answer is None:
                    raise RemoteStoreError(f"the {self.kind} store is closed")
                if isinstance(answer[1], FileNotFoundError):
                    continue
                if isinstance(answer[1], BaseException):
                    failure = failure or answer[1]
                else:
                    take(*answer)
        except (queue.Empty, RemoteTimeoutError):
            raise RemoteTimeoutError("the object store has not answered in time") from failure
        finally:
            batch.cancel()
        if failure is not None:
            raise _translated(failure) from failure

    def _submit(self, batch: Coroutine[Any, Any, None]) -> Future[None]:
        with self._lock:
            if not self._closed.is_set():
                return asyncio.run_coroutine_threadsafe(batch, self._loop)
        batch.close()
        raise RemoteStoreError(f"the {self.kind} store is closed")

    async def _ask_all(
        self, num_keys: int, ask: Request, answers: queue.SimpleQueue[tuple[int, object] | None]
    ) -> None:
        async def one(i: int) -> None:
            answer: object
            async with self._slots:
                try:
                    answer = await ask(i)
                except Exception as error:  # the boundary of this thread: the caller's decides what it means
                    answer = error
            answers.put((i, answer))

        await asyncio.gather(*(one(i) for i in range(num_keys)))

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()


def _copy_value(body: memoryview, key: str, payload: memoryview) -> bool:
    """Verify a body and copy its payload; return whether it is the value of `key`."""
    body = body.cast("B")
    if body.nbytes != value_bytes(payload.nbytes) or not is_intact(body[:HEADER_BYTES], key, body[HEADER_BYTES:]):
        return False
    np.copyto(np.frombuffer(payload, np.uint8), np.frombuffer(body, np.uint8)[HEADER_BYTES:])
    return True


def _translated(error: BaseException) -> BaseException:
    """Return what a failure of obstore means to the caller; other errors as they are."""
    refusals = (
        obstore_exceptions.PermissionDeniedError,
        obstore_exceptions.UnauthenticatedError,
        obstore_exceptions.NotSupportedError,
        obstore_exceptions.InvalidPathError,
    )
    if isinstance(error, refusals):
        return RemoteStoreError(f"the object store refuses: {_first_line(error)}")
    if isinstance(error, (obstore_exceptions.BaseError, OSError)):
        return RemoteStoreError(f"the object store failed: {_first_line(error)}", is_transient=True)
    return error


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
