"""When to stop asking a store that fails.

CLOSED     every call goes through; `failure_limit` failures in a row open it
OPEN       no call goes through until `cooldown_s` have passed; the next one after that is the probe
HALF_OPEN  the probe is under way, no other call goes through; how it ends decides
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class BreakerState(StrEnum):
    """What a circuit breaker does with calls."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerEvent(StrEnum):
    """What a circuit breaker is told, or notices."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    FAILED_TOO_OFTEN = "failed_too_often"
    COOLED_DOWN = "cooled_down"


_S, _E = BreakerState, BreakerEvent
TRANSITIONS: Final = {
    (_S.CLOSED, _E.SUCCEEDED): _S.CLOSED,
    (_S.CLOSED, _E.FAILED): _S.CLOSED,
    (_S.CLOSED, _E.FAILED_TOO_OFTEN): _S.OPEN,
    (_S.OPEN, _E.COOLED_DOWN): _S.HALF_OPEN,
    (_S.HALF_OPEN, _E.SUCCEEDED): _S.CLOSED,
    (_S.HALF_OPEN, _E.FAILED): _S.OPEN,
    (_S.HALF_OPEN, _E.FAILED_TOO_OFTEN): _S.OPEN,
}
"""State and event -> next state; what is not listed cannot happen."""


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one call; `CircuitBreaker.leave` takes it back.

    Attributes:
        is_probe: the call decides whether the breaker closes again.
        epoch: transitions of the breaker when the permit was given.
    """

    is_probe: bool
    epoch: int


class CircuitBreaker:
    """Counts how calls end, and decides whether the next may begin. Thread-safe."""

    def __init__(self, failure_limit: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Open after `failure_limit` failures in a row, probe `cooldown_s` seconds of `clock` later."""
        self._failure_limit = failure_limit
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED  # this and the following are protected by _lock
        self._num_failures = 0
        self._opened_at = 0.0
        self._epoch = 0
        self._num_opened = 0

    @property
    def state(self) -> BreakerState:
        """What the breaker does now."""
        with self._lock:
            return self._state

    @property
    def num_opened(self) -> int:
        """How often it has opened; a counter."""
        with self._lock:
            return self._num_opened

    def enter(self) -> Permit | None:
        """Ask to make a call; None: not now."""
        with self._lock:
            if self._state is BreakerState.OPEN and self._clock() - self._opened_at >= self._cooldown_s:
                self._move(BreakerEvent.COOLED_DOWN)
                return Permit(is_probe=True, epoch=self._epoch)
            if self._state is not BreakerState.CLOSED:
                return None
            return Permit(is_probe=False, epoch=self._epoch)

    def leave(self, permit: Permit, *, ok: bool) -> None:
        """Say how the call ended. One that began before the latest change of state says nothing any more."""
        with self._lock:
            if permit.epoch != self._epoch:
                return
            if ok:
                self._num_failures = 0
                self._move(BreakerEvent.SUCCEEDED)
                return
            self._num_failures += 1
            too_often = self._num_failures >= self._failure_limit
            self._move(BreakerEvent.FAILED_TOO_OFTEN if too_often else BreakerEvent.FAILED)

    def _move(self, event: BreakerEvent) -> None:
        state = TRANSITIONS[self._state, event]
        if state is self._state:
            return
        self._state = state
        self._epoch += 1
        if state is BreakerState.OPEN:
            self._opened_at = self._clock()
            self._num_opened += 1
        elif state is BreakerState.CLOSED:
            self._num_failures = 0
