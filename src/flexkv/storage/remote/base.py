"""The contract of a remote store: values by key, many at once, within a deadline.

    RemoteStore            the contract
      RemoteBackend        checks arguments once; posix, redis, s3 and mooncake fill in its hooks
      ResilientStore       the same contract around a backend: retries, circuit breaker, counters

A deadline is an absolute time of `time.monotonic()` in seconds. A call returns or raises by then, plus the grace that
the backend's file states. Once a call is over, the store touches none of its buffers any more.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from flexkv.errors import FlexKVError, InvalidRequestError
from flexkv.storage.remote.keys import require_keys

BoolArray = npt.NDArray[np.bool_]
BlockBuffer = npt.NDArray[Any] | memoryview | bytearray | bytes
"""The bytes of one block: any C-contiguous buffer."""

_LONGEST_WAIT_S: Final = 1e6
_LARGEST_BATCH: Final = 1_000_000


class RemoteStoreError(FlexKVError, RuntimeError):
    """A remote store could not do what it was asked; raised by backends, never by `ResilientStore`.

    Attributes:
        is_transient: the same call may succeed if it is made again.
        done: which entries of the batch were done before the failure, None when that is unknown.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        """Say what failed, and whether another attempt makes sense."""
        super().__init__(message)
        self.is_transient = is_transient
        self.done: BoolArray | None = None


class RemoteTimeoutError(RemoteStoreError):
    """The deadline came first."""


def time_left(deadline: float) -> float:
    """Return the seconds until `deadline`, more than 0 and not more than a socket or lock can wait.

    Raises:
        RemoteTimeoutError: it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise RemoteTimeoutError("the deadline has passed")
    return min(left, _LONGEST_WAIT_S)


class RemoteStore(ABC):
    """Values by key. Thread-safe: any thread may call anything at any time, `close` included.

    Keys are made by `keys.block_key`. Batches are answered entry by entry: a bool array `[len(keys)]`.
    """

    kind: ClassVar[str]
    """What the store is, for logs and metrics."""

    @abstractmethod
    def exists(self, keys: Sequence[str], deadline: float) -> BoolArray:
        """Return which keys have a value, be it good or bad.

        Raises:
            InvalidRequestError: a key that `block_key` does not make.
            RemoteStoreError: the store cannot answer.
        """

    @abstractmethod
    def get(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        """Fill `buffers[i]` with the value of `keys[i]`; return which are filled and verified.

        Missing, short, long, corrupt and misplaced values are False. The content of a buffer that is not True is
        undefined, also after an error, where `RemoteStoreError.done` plays the part of the result.

        Raises:
            InvalidRequestError: keys and buffers that do not match, or a buffer that cannot be written.
            RemoteStoreError: the store cannot answer.
        """

    @abstractmethod
    def put(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        """Store `buffers[i]` under `keys[i]`, in place of what was there; return which are stored.

        Each value is stored whole or not at all, and readers see the old value or the new one, whatever becomes of
        this process. False without an error: the store is full, or somebody else is just writing the same key.

        Raises:
            InvalidRequestError: keys and buffers that do not match.
            RemoteStoreError: the store cannot take them.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str], deadline: float) -> None:
        """Remove values; keys without one are no error.

        Raises:
            InvalidRequestError: a key that `block_key` does not make.
            RemoteStoreError: some may still be there.
        """

    @abstractmethod
    def ping(self, deadline: float) -> bool:
        """Ask the cheapest question there is; return whether the store answered it."""

    @property
    @abstractmethod
    def num_bad_values(self) -> int:
        """Values found since the start that were there and could not be trusted; a counter."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections, threads and processes. Calls under way end by their deadline. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RemoteBackend(RemoteStore):
    """What the backends share. Their hooks get checked arguments, and mark in `done` what they have achieved."""

    def __init__(self) -> None:
        """Start open, with nothing counted."""
        self._closed = threading.Event()
        self._count_lock = threading.Lock()
        self._num_bad_values = 0

    def exists(self, keys: Sequence[str], deadline: float) -> BoolArray:
        """See `RemoteStore`."""
        require_keys(keys)
        with self._batch(len(keys), deadline) as done:
            if len(keys):
                self._exists(keys, done, deadline)
        return done

    def get(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        """See `RemoteStore`."""
        views = byte_views(keys, buffers, writable=True)
        with self._batch(len(keys), deadline) as done:
            if len(keys):
                self._get(keys, views, done, deadline)
        return done

    def put(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        """See `RemoteStore`."""
        views = byte_views(keys, buffers, writable=False)
        with self._batch(len(keys), deadline) as done:
            if len(keys):
                self._put(keys, views, done, deadline)
        return done

    def delete(self, keys: Sequence[str], deadline: float) -> None:
        """See `RemoteStore`."""
        require_keys(keys)
        with self._batch(len(keys), deadline):
            if len(keys):
                self._delete(keys, deadline)

    def ping(self, deadline: float) -> bool:
        """See `RemoteStore`."""
        try:
            with self._batch(0, deadline):
                self._ping(deadline)
        except RemoteStoreError:
            return False
        return True

    @property
    def num_bad_values(self) -> int:
        """See `RemoteStore`."""
        return self._num_bad_values

    def _count_bad_value(self) -> None:
        with self._count_lock:
            self._num_bad_values += 1

    @contextmanager
    def _batch(self, num_keys: int, deadline: float) -> Iterator[BoolArray]:
        """Give the array of results; an error leaves with it."""
        done = np.zeros(num_keys, np.bool_)
        try:
            if self._closed.is_set():
                raise RemoteStoreError(f"the {self.kind} store is closed")
            time_left(deadline)
            yield done
        except RemoteStoreError as error:
            error.done = done
            raise

    @abstractmethod
    def _exists(self, keys: Sequence[str], done: BoolArray, deadline: float) -> None: ...

    @abstractmethod
    def _get(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None: ...

    @abstractmethod
    def _put(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None: ...

    @abstractmethod
    def _delete(self, keys: Sequence[str], deadline: float) -> None: ...

    @abstractmethod
    def _ping(self, deadline: float) -> None:
        """Raise a `RemoteStoreError` when the store does not answer."""


def byte_views(keys: Sequence[str], buffers: Sequence[BlockBuffer], *, writable: bool) -> list[memoryview]:
    """Return the buffers as flat views of bytes, after checking that they and the keys can be served.

    Raises:
        InvalidRequestError: they cannot; the message names the entry.
    """
    require_keys(keys)
    if len(keys) != len(buffers):
        raise InvalidRequestError(f"{len(keys)} keys came with {len(buffers)} buffers")
    if len(keys) > _LARGEST_BATCH:
        raise InvalidRequestError(f"a batch has at most {_LARGEST_BATCH} keys, this one has {len(keys)}")
    views = []
    for i, buffer in enumerate(buffers):
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        if not view.c_contiguous:
            raise InvalidRequestError(f"buffer {i} is not contiguous")
        if writable and view.readonly:
            raise InvalidRequestError(f"buffer {i} cannot be written")
        if view.nbytes == 0:
            raise InvalidRequestError(f"buffer {i} is empty; a block has at least one byte")
        views.append(view.cast("B"))
    return views
