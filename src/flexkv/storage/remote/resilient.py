"""A remote store that never fails its caller: what goes wrong is a miss, and is counted."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from flexkv.common.config import ResilienceConfig
from flexkv.storage.remote.base import (
    BlockBuffer,
    BoolArray,
    RemoteStore,
    RemoteStoreError,
    RemoteTimeoutError,
    byte_views,
)
from flexkv.storage.remote.breaker import BreakerState, CircuitBreaker, Permit
from flexkv.storage.remote.keys import require_keys

logger = logging.getLogger(__name__)

# Backends translate what their client raises; what slips through (a dying socket, a library's own error) is a failure
# of the store too. Errors of another kind are bugs, and are not hidden.
_FAILURES: Final = (RemoteStoreError, OSError, RuntimeError)

Indices = npt.NDArray[np.intp]
Attempt = Callable[[Indices], BoolArray]
"""Does part of a batch: takes positions in it, returns which of them are done."""


@dataclass(slots=True)
class RemoteStats:
    """What a store has done; all but the state only grow.

    Attributes:
        hits: values read and verified.
        misses: reads that found nothing they could trust, for whatever reason.
        stored: values written.
        not_stored: writes that did not happen, for whatever reason.
        bytes_read: payload of `hits`.
        bytes_written: payload of `stored`.
        bad_values: values that were there and could not be trusted.
        failures: calls that ended with a failure, after their retries.
        timeouts: those of them that ended by their deadline.
        retries: attempts after the first.
        rejected: calls answered at once because the breaker was open.
        breaker_opened: how often the breaker has opened.
        breaker_state: what it does now.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    not_stored: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bad_values: int = 0
    failures: int = 0
    timeouts: int = 0
    retries: int = 0
    rejected: int = 0
    breaker_opened: int = 0
    breaker_state: str = BreakerState.CLOSED


class ResilientStore(RemoteStore):
    """Wraps a store: nothing but programming errors (`InvalidRequestError`) comes out of it."""

    kind = "resilient"

    def __init__(
        self,
        store: RemoteStore,
        config: ResilienceConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        """Wrap `store`, which is closed with this one.

        Args:
            store: the store to ask.
            config: how often.
            clock: what deadlines and the cool-down are measured with.
            wait: waits for so many seconds before a retry, and returns whether the store was closed meanwhile.
        """
        self.store = store
        self.config = config or ResilienceConfig()
        self._clock = clock
        self._closing = threading.Event()
        self._wait = wait or self._closing.wait
        self._breaker = CircuitBreaker(self.config.failure_limit, self.config.cooldown_s, clock)
        self._lock = threading.Lock()
        self._stats = RemoteStats()  # protected by _lock

    def stats(self) -> RemoteStats:
        """Return a copy of the counters."""
        with self._lock:
            stats = replace(self._stats)
        stats.bad_values = self.store.num_bad_values
        stats.breaker_opened = self._breaker.num_opened
        stats.breaker_state = str(self._breaker.state)
        return stats

    def exists(self, keys: Sequence[str], deadline: float) -> BoolArray:
        """Return which keys have a value; False where the store cannot say."""
        require_keys(keys)
        return self._run(len(keys), deadline, lambda i: self.store.exists([keys[k] for k in i], deadline))

    def get(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        """Fill buffers; False where that failed, whatever the reason."""
        views = byte_views(keys, buffers, writable=True)
        done = self._run(
            len(keys), deadline, lambda i: self.store.get([keys[k] for k in i], [views[k] for k in i], deadline)
        )
        hits = int(done.sum())
        num_bytes = sum(views[k].nbytes for k in np.flatnonzero(done))
        self._count(hits=hits, misses=len(keys) - hits, bytes_read=num_bytes)
        return done

    def put(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        """Store values; False where that failed, whatever the reason."""
        views = byte_views(keys, buffers, writable=False)
        done = self._run(
            len(keys), deadline, lambda i: self.store.put([keys[k] for k in i], [views[k] for k in i], deadline)
        )
        stored = int(done.sum())
        num_bytes = sum(views[k].nbytes for k in np.flatnonzero(done))
        self._count(stored=stored, not_stored=len(keys) - stored, bytes_written=num_bytes)
        return done

    def delete(self, keys: Sequence[str], deadline: float) -> None:
        """Remove values, as far as the store can be reached."""
        require_keys(keys)

        def attempt(indices: Indices) -> BoolArray:
            self.store.delete([keys[k] for k in indices], deadline)
            return np.ones(len(indices), np.bool_)

        self._run(len(keys), deadline, attempt)

    def ping(self, deadline: float) -> bool:
        """Ask the store, whatever the breaker thinks of it; the breaker does not learn the answer."""
        return self.store.ping(deadline)

    @property
    def num_bad_values(self) -> int:
        """See `RemoteStore`."""
        return self.store.num_bad_values

    def close(self) -> None:
        """Close the store; retries that wait give up."""
        self._closing.set()
        self.store.close()

    def _run(self, num_keys: int, deadline: float, attempt: Attempt) -> BoolArray:
        done = np.zeros(num_keys, np.bool_)
        if num_keys == 0:
            return done
        if self._clock() >= deadline:  # the caller is late: that says nothing about the store
            self._count(failures=1, timeouts=1)
            return done
        permit = self._breaker.enter()
        if permit is None:
            self._count(rejected=1)
            return done
        ok = False
        try:
            ok = self._attempts(done, deadline, attempt, permit)
        finally:
            self._breaker.leave(permit, ok=ok)
        return done

    def _attempts(self, done: BoolArray, deadline: float, attempt: Attempt, permit: Permit) -> bool:
        """Fill `done`, with retries; return whether the store has answered."""
        pending = np.arange(len(done))
        num_retries = 0
        while True:
            try:
                done[pending] = attempt(pending)
                return True
            except _FAILURES as error:
                achieved = getattr(error, "done", None)
                if achieved is not None and len(achieved) == len(pending):
                    done[pending] = achieved
                    pending = pending[~achieved]
                if self._may_retry(error, num_retries, deadline, permit) and len(pending):
                    num_retries += 1
                    self._count(retries=1)
                    continue
                self._count(failures=1, timeouts=int(isinstance(error, RemoteTimeoutError)))
                logger.warning("remote call failed store=%s retries=%d error=%s", self.store.kind, num_retries, error)
                return False

    def _may_retry(self, error: Exception, num_retries: int, deadline: float, permit: Permit) -> bool:
        """Wait before another attempt; return False where there is none."""
        may_pass = isinstance(error, OSError) or getattr(error, "is_transient", False)
        if not may_pass or permit.is_probe or num_retries >= self.config.max_retries:
            return False
        backoff = min(self.config.backoff_s * 2**num_retries, self.config.max_backoff_s) * random.uniform(0.5, 1.0)
        if self._clock() + backoff >= deadline:
            return False
        return not self._wait(backoff) and not self._closing.is_set()

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)
