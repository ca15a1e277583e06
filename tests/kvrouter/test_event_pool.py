"""The event workers: who gets which pod, and what a full queue means."""

from __future__ import annotations

import threading

import pytest

from kvblocks.replay import ReplayResult
from kvrouter.errors import ConfigError, DeadlineExceededError
from kvrouter.kvblock.base import ApplyResult
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvevents.adapters import EventMessage, parse_message, parse_topic
from kvrouter.kvevents.counters import EventCounters
from kvrouter.kvevents.pool import EventPool, shard_of
from kvrouter.kvevents.worker import StreamId

STREAM = StreamId("pod-a", "m", "tcp://x")


class SlowApplier:
    """Applies nothing, and only once it is let through."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.payloads: list[bytes] = []

    def apply(self, pod: str, model: str, payload: bytes) -> ApplyResult:
        self.entered.set()
        assert self.gate.wait(20)
        self.payloads.append(payload)
        return ApplyResult(0, 0, 0, 0, 0)


def message(seq: int) -> EventMessage:
    return EventMessage("t", seq, str(seq).encode())


def test_pods_are_spread_by_fnv1a_of_their_name() -> None:
    assert shard_of("pod-a", 4) == 2
    assert shard_of("10.0.0.1:8000", 4) == 1
    assert {shard_of(f"pod-{i}", 4) for i in range(100)} == {0, 1, 2, 3}


def test_topics_name_pod_and_model() -> None:
    assert parse_topic("kv@pod@org/model@v2") == ("pod", "org/model@v2")
    assert parse_topic("kv@10.0.0.1:8000@m") == ("10.0.0.1:8000", "m")
    for other in ("", "kv-events", "kv@pod", "kv@@m", "KV@pod@m"):
        assert parse_topic(other) == (other, "")


def test_frames_that_are_no_message_are_told_apart() -> None:
    assert parse_message([b"t", bytes(7) + b"\x05", b"p"]) == EventMessage("t", 5, b"p")
    for frames in ([], [b"t", b"p"], [b"t", b"5", b"p"], [b"t", b"\xff" * 8, b"p"], [b"t", bytes(8), b"p", b""]):
        assert parse_message(frames) is None


def test_full_queue_drops_messages_and_counts_as_a_gap() -> None:
    applier, counters = SlowApplier(), EventCounters()
    pool = EventPool(InMemoryIndex(), applier, counters, concurrency=1, queue_size=4)
    pool.start()
    try:
        pool.open(STREAM, None)
        assert pool.put(STREAM, message(0))
        assert applier.entered.wait(20)  # from here on the worker takes nothing
        accepted = [pool.put(STREAM, message(seq)) for seq in range(1, 7)]
        assert accepted == [True] * 4 + [False] * 2
        applier.gate.set()
        pool.wait_applied("pod-a", 4, 20)
        pool.put(STREAM, message(7))
        pool.wait_applied("pod-a", 7, 20)
    finally:
        pool.close()
    assert applier.payloads == [b"0", b"1", b"2", b"3", b"4", b"7"]
    assert counters["gaps"] >= 1
    assert counters["histories_lost"] >= 1, "without a replay endpoint"


def test_waiting_has_a_deadline() -> None:
    pool = EventPool(InMemoryIndex(), SlowApplier(), EventCounters(), concurrency=1)
    with pytest.raises(DeadlineExceededError, match="pod 'pod-a'"):
        pool.wait_applied("pod-a", 0, 0.01)
    pool.close()


@pytest.mark.parametrize("option", ["concurrency", "queue_size", "replay_timeout_s"])
def test_numbers_that_make_no_sense_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is above 0"):
        EventPool(InMemoryIndex(), SlowApplier(), EventCounters(), **{option: 0})


def test_restarts_in_a_row_want_one_replay_of_the_latest_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[str, int]] = []
    busy, free = threading.Semaphore(0), threading.Event()

    class SlowReplay:
        def __init__(self, endpoint: str, timeout_s: float) -> None:
            self.endpoint = endpoint

        def replay(self, start_seq: int) -> ReplayResult:
            wanted.append((self.endpoint, start_seq))
            busy.release()
            assert free.wait(20)
            return ReplayResult(start_seq, (), True)

    monkeypatch.setattr("kvrouter.kvevents.pool.ReplayClient", SlowReplay)
    applier = SlowApplier()
    applier.gate.set()
    pool = EventPool(InMemoryIndex(), applier, EventCounters(), concurrency=1)
    pool.start()
    try:
        others = [StreamId(f"pod-{i}", "m", f"tcp://{i}") for i in range(4)]
        for other in others:
            pool.open(other, "tcp://other")
            assert busy.acquire(timeout=20)
        pool.open(STREAM, "tcp://x")
        for _ in range(50):  # each begins a new generation, with a gap
            pool.put(STREAM, message(7))
        pool.reset("nobody")  # all of them are in
        assert len(pool._wanted) == 1
        assert pool._replays._work_queue.qsize() == 1
        free.set()
        assert busy.acquire(timeout=20)
        assert wanted[4:] == [("tcp://x", 0)]
    finally:
        free.set()
        pool.close()


def test_worker_that_fails_marks_its_pods_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    class Poisonous:
        def apply(self, pod: str, model: str, payload: bytes) -> ApplyResult:
            if payload == b"13":
                raise RuntimeError("bug")
            return ApplyResult(0, 0, 0, 0, 0)

    pool = EventPool(InMemoryIndex(), Poisonous(), EventCounters(), concurrency=4)
    other = StreamId("10.0.0.1:8000", "m", "tcp://y")
    pool.start()
    try:
        pool.open(STREAM, None)
        pool.open(other, None)
        pool.put(STREAM, EventMessage("t", 0, b"13"))
        pool.put(other, message(0))
        pool.wait_applied(other.pod, 0, 20)
        pool._workers[shard_of("pod-a", 4)].thread.join(20)
        assert not pool.put(STREAM, message(1))
        pool.reset("pod-a")  # returns at once
        assert [state.value for state in pool.states()["pod-a"]] == ["degraded"]
    finally:
        pool.close()
    assert "kv event worker failed" in caplog.text
