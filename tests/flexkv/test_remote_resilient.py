"""Retries and the circuit breaker, against a store that fails as told."""

import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from flexkv.common.config import ResilienceConfig
from flexkv.errors import ConfigError, InvalidRequestError
from flexkv.storage.remote.base import BlockBuffer, BoolArray, RemoteStore, RemoteStoreError, RemoteTimeoutError
from flexkv.storage.remote.breaker import TRANSITIONS, BreakerEvent, BreakerState, CircuitBreaker
from flexkv.storage.remote.keys import block_key
from flexkv.storage.remote.resilient import ResilientStore

KEYS = [block_key(None, "m", bytes([i])) for i in range(4)]
OK: list[Exception | None] = [None]


def transient(done: list[bool] | None = None) -> RemoteStoreError:
    error = RemoteStoreError("the line went dead", is_transient=True)
    error.done = None if done is None else np.array(done)
    return error


class ScriptedStore(RemoteStore):
    """Every call takes the next outcome of the script: an error to raise, or None to do all that is asked."""

    kind = "scripted"

    def __init__(self, script: Sequence[Exception | None]) -> None:
        self.script = list(script)
        self.calls: list[tuple[str, list[str]]] = []
        self.is_closed = False
        self.on_call: Callable[[], object] = lambda: None

    def _next(self, name: str, keys: Sequence[str]) -> BoolArray:
        self.calls.append((name, list(keys)))
        outcome = self.script.pop(0) if self.script else None
        self.on_call()
        if outcome is not None:
            raise outcome
        return np.ones(len(keys), np.bool_)

    def exists(self, keys: Sequence[str], deadline: float) -> BoolArray:
        return self._next("exists", keys)

    def get(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        return self._next("get", keys)

    def put(self, keys: Sequence[str], buffers: Sequence[BlockBuffer], deadline: float) -> BoolArray:
        return self._next("put", keys)

    def delete(self, keys: Sequence[str], deadline: float) -> None:
        self._next("delete", keys)

    def ping(self, deadline: float) -> bool:
        return not self.is_closed

    @property
    def num_bad_values(self) -> int:
        return 7

    def close(self) -> None:
        self.is_closed = True


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


def make(script: Sequence[Exception | None], **config) -> tuple[ResilientStore, ScriptedStore, Clock]:
    inner, clock = ScriptedStore(script), Clock()
    return ResilientStore(inner, ResilienceConfig(**config), clock=clock, wait=clock.wait), inner, clock


def buffers(count: int = 4) -> list[np.ndarray]:
    return [np.zeros(10, np.uint8) for _ in range(count)]


def test_calls_go_through_and_are_counted() -> None:
    store, inner, _ = make([])
    assert store.put(KEYS, buffers(), 200.0).all()
    assert store.get(KEYS[:3], buffers(3), 200.0).all()
    assert store.exists(KEYS, 200.0).all()
    store.delete(KEYS, 200.0)
    assert [name for name, _ in inner.calls] == ["put", "get", "exists", "delete"]
    stats = store.stats()
    assert (stats.stored, stats.bytes_written, stats.hits, stats.bytes_read) == (4, 40, 3, 30)
    assert (stats.misses, stats.not_stored, stats.failures, stats.retries) == (0, 0, 0, 0)
    assert stats.bad_values == 7


def test_transient_failures_are_retried_with_growing_jittered_waits() -> None:
    store, inner, clock = make([transient()] * 4, max_retries=4, backoff_s=1.0, max_backoff_s=3.0)
    assert store.get(KEYS, buffers(), 200.0).all()
    assert len(inner.calls) == 5
    stats = store.stats()
    assert (stats.retries, stats.failures, stats.hits) == (4, 0, 4)
    for wait, longest in zip(clock.waits, (1.0, 2.0, 3.0, 3.0), strict=True):
        assert longest / 2 <= wait <= longest


def test_retries_end_and_become_misses() -> None:
    store, inner, _ = make([transient()] * 9, max_retries=2)
    assert not store.get(KEYS, buffers(), 200.0).any()
    assert len(inner.calls) == 3
    stats = store.stats()
    assert (stats.retries, stats.failures, stats.misses, stats.timeouts) == (2, 1, 4, 0)


def test_only_what_is_missing_is_asked_again() -> None:
    store, inner, _ = make([transient([True, False, True, False]), transient([False, True])])
    assert store.get(KEYS, buffers(), 200.0).all()
    assert [keys for _, keys in inner.calls] == [KEYS, KEYS[1::2], KEYS[1:2]]
    assert store.stats().hits == 4


def test_what_was_done_before_a_failure_counts() -> None:
    store, _, _ = make([transient([True, False, True, False])], max_retries=0)
    assert store.put(KEYS, buffers(), 200.0).tolist() == [True, False, True, False]
    stats = store.stats()
    assert (stats.stored, stats.not_stored, stats.failures) == (2, 2, 1)


@pytest.mark.parametrize(
    ("error", "num_timeouts"), [(RemoteStoreError("no such bucket"), 0), (RemoteTimeoutError("late"), 1)]
)
def test_failures_that_will_not_pass_are_not_retried(error: Exception, num_timeouts: int) -> None:
    store, inner, _ = make([error])
    assert not store.exists(KEYS, 200.0).any()
    assert len(inner.calls) == 1
    assert (store.stats().failures, store.stats().timeouts) == (1, num_timeouts)


@pytest.mark.parametrize("error", [OSError("broken pipe"), RuntimeError("the library gave up")])
def test_errors_of_libraries_do_not_come_out(error: Exception) -> None:
    store, _, _ = make([error], max_retries=0)
    store.delete(KEYS, 200.0)
    assert store.stats().failures == 1


def test_a_retry_that_would_come_too_late_is_not_made() -> None:
    store, inner, clock = make([transient()] * 3, backoff_s=10.0, max_backoff_s=10.0)
    assert not store.get(KEYS, buffers(), 104.0).any()
    assert len(inner.calls) == 1
    assert clock.waits == []


def test_a_late_call_does_not_blame_the_store() -> None:
    store, inner, _ = make([], failure_limit=1)
    assert not store.get(KEYS, buffers(), 99.0).any()
    assert inner.calls == []
    stats = store.stats()
    assert (stats.timeouts, stats.misses, stats.breaker_state) == (1, 4, "closed")


def test_the_breaker_opens_answers_at_once_and_lets_one_probe_through() -> None:
    store, inner, clock = make([RemoteStoreError("down")] * 3, failure_limit=3, cooldown_s=5.0)
    for _ in range(3):
        assert not store.get(KEYS, buffers(), 999.0).any()
    assert (store.stats().breaker_state, store.stats().breaker_opened) == ("open", 1)
    clock.now += 4.9
    assert not store.get(KEYS, buffers(), 999.0).any()
    assert len(inner.calls) == 3
    assert (store.stats().rejected, store.stats().misses, store.stats().failures) == (1, 16, 3)
    clock.now += 0.1
    inner.script = [transient()]
    assert not store.get(KEYS, buffers(), 999.0).any(), "the probe fails, and is not retried"
    assert len(inner.calls) == 4
    assert (store.stats().breaker_state, store.stats().breaker_opened) == ("open", 2)
    clock.now += 5.0
    assert store.get(KEYS, buffers(), 999.0).all()
    assert store.stats().breaker_state == "closed"


def test_nobody_else_gets_through_while_the_probe_is_under_way() -> None:
    store, inner, clock = make([RemoteStoreError("down")], failure_limit=1, cooldown_s=1.0)
    store.delete(KEYS, 999.0)
    clock.now += 1.0
    seen: list[object] = []
    inner.on_call = lambda: seen.append(
        (store.stats().breaker_state, store.get(KEYS, buffers(), 999.0).any(), len(inner.calls))
    )
    assert store.exists(KEYS, 999.0).all()
    assert seen == [("half_open", False, 2)]
    assert store.stats().rejected == 1


def test_a_success_forgets_earlier_failures() -> None:
    down = RemoteStoreError("down")
    store, _, _ = make([down, down, None, down, down], failure_limit=3)
    for _ in range(5):
        store.exists(KEYS, 999.0)
    assert store.stats().breaker_state == "closed"


def test_programming_errors_come_out_and_do_not_wedge_the_breaker() -> None:
    store, inner, clock = make([RemoteStoreError("down")], failure_limit=1, cooldown_s=1.0)
    with pytest.raises(InvalidRequestError):
        store.get(KEYS, buffers(1), 999.0)
    store.delete(KEYS, 999.0)
    clock.now += 1.0
    inner.script = [TypeError("a bug")]
    with pytest.raises(TypeError, match="a bug"):
        store.exists(KEYS, 999.0)
    assert store.stats().breaker_state == "open"
    clock.now += 1.0
    assert store.exists(KEYS, 999.0).all()


def test_closing_ends_a_wait_for_a_retry() -> None:
    inner = ScriptedStore([transient()] * 100)
    store = ResilientStore(inner, ResilienceConfig(max_retries=100, backoff_s=1000.0, max_backoff_s=1000.0))
    waiting = threading.Event()
    inner.on_call = waiting.set
    thread = threading.Thread(target=lambda: store.get(KEYS, buffers(), float("inf")))
    thread.start()
    assert waiting.wait(60.0)
    store.close()
    thread.join(60.0)
    assert not thread.is_alive()
    assert inner.is_closed
    assert not store.ping(999.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_retries", -1), ("max_retries", 1.5), ("failure_limit", 0), ("backoff_s", -1), ("cooldown_s", float("nan"))],
)
def test_bad_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        ResilienceConfig(**{name: value})


# -- the breaker by itself ---------------------------------------------------------------------------------------------
def test_the_table_says_what_can_happen_in_every_state() -> None:
    reachable = {BreakerState.CLOSED}
    for _ in BreakerState:
        reachable |= {after for (before, _), after in TRANSITIONS.items() if before in reachable}
    assert reachable == set(BreakerState)
    impossible = set(itertools.product(BreakerState, BreakerEvent)) - set(TRANSITIONS)
    assert {event for state, event in impossible if state is not BreakerState.OPEN} == {BreakerEvent.COOLED_DOWN}
    assert {event for state, event in TRANSITIONS if state is BreakerState.OPEN} == {BreakerEvent.COOLED_DOWN}


def test_a_call_that_began_before_the_breaker_moved_decides_nothing() -> None:
    clock = Clock()
    breaker = CircuitBreaker(1, 1.0, clock)
    slow, quick = breaker.enter(), breaker.enter()
    assert slow is not None
    assert quick is not None
    breaker.leave(quick, ok=False)
    clock.now += 1.0
    probe = breaker.enter()
    assert probe is not None
    assert probe.is_probe
    breaker.leave(slow, ok=True)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.leave(probe, ok=True)
    assert breaker.state is BreakerState.CLOSED
    breaker.leave(slow, ok=False)
    assert breaker.state is BreakerState.CLOSED
