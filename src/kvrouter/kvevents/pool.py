"""Workers that enter events into the index, in order per pod.

    subscriber thread --put()--> queue of worker FNV-1a(pod) % concurrency  (bounded; full: dropped, which is a gap)
    any thread --control--> the same queue                                   (few, never dropped)
    replay threads --result--> the same queue
    worker --replay wanted--> _wanted (one per stream, the latest) --> replay threads

Everything about a stream belongs to the one worker of its pod, so streams need no locks. Replays run on threads of
their own, so that an engine that does not answer holds up nobody else's events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from kvblocks.errors import KVBlocksError
from kvblocks.replay import ReplayClient
from kvrouter.errors import ConfigError, DeadlineExceededError
from kvrouter.kvblock.base import EventApplier, Index
from kvrouter.kvevents.adapters import EventMessage
from kvrouter.kvevents.counters import EventCounters
from kvrouter.kvevents.recovery import StreamState
from kvrouter.kvevents.worker import WAKE_S, Control, Live, Replayed, StreamId, Worker

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S: Final = 5.0
_NUM_REPLAY_THREADS: Final = 4


def shard_of(pod: str, num_shards: int) -> int:
    """Return the worker of a pod: FNV-1a (32 bits) of its name, modulo the number of workers."""
    digest = 0x811C9DC5
    for byte in pod.encode():
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return digest % num_shards


@dataclass(frozen=True, slots=True)
class _WantedReplay:
    endpoint: str
    start_seq: int
    generation: int


class EventPool:
    """Owns the workers and their queues; every method may be called from any thread."""

    def __init__(
        self,
        index: Index,
        applier: EventApplier,
        counters: EventCounters,
        *,
        concurrency: int = 4,
        queue_size: int = 16_384,
        replay_timeout_s: float = 5.0,
    ) -> None:
        """Configure a pool; `start` starts its threads.

        Raises:
            ConfigError: a number that is not positive.
        """
        for name, value in (
            ("concurrency", concurrency),
            ("queue_size", queue_size),
            ("replay_timeout_s", replay_timeout_s),
        ):
            if value <= 0:
                raise ConfigError(f"{name} is above 0, not {value}")
        self.counters: Final = counters
        self.replay_timeout_s: Final = replay_timeout_s
        self._workers: Final = [
            Worker(index, applier, counters, self._start_replay, number=i, queue_size=queue_size)
            for i in range(concurrency)
        ]
        self._replays: Final = ThreadPoolExecutor(_NUM_REPLAY_THREADS, thread_name_prefix="kv-replay")
        self._lock: Final = threading.Lock()
        self._is_started = False  # protected by _lock
        self._is_closed = False  # protected by _lock
        self._wanted: dict[StreamId, _WantedReplay] = {}  # protected by _lock; those no replay thread has begun

    def start(self) -> None:
        """Start the workers; a second call does nothing."""
        with self._lock:
            if self._is_started or self._is_closed:
                return
            self._is_started = True
            for worker in self._workers:
                worker.thread.start()

    def close(self) -> None:
        """Stop the workers, dropping what is queued; a second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            was_started = self._is_started
        for worker in self._workers:
            worker.stop()
        self._replays.shutdown(wait=False, cancel_futures=True)
        if was_started:
            for worker in self._workers:
                worker.thread.join(_CLOSE_TIMEOUT_S)
                if worker.thread.is_alive():
                    logger.error("kv event worker did not end name=%s", worker.thread.name)

    def fail(self) -> None:
        """Nothing will be heard any more: end the workers, clear their pods and leave their streams degraded."""
        for worker in self._workers:
            worker.fail()

    def put(self, stream: StreamId, message: EventMessage) -> bool:
        """Queue a live message; False if there was no room, which the worker will treat as a gap, or it has failed."""
        return self._worker(stream.pod).put(Live(stream, message))

    def open(self, stream: StreamId, replay_endpoint: str | None) -> None:
        """Announce a stream, and fetch what its publisher said before."""
        self._run(stream.pod, lambda worker: worker.open(stream, replay_endpoint))

    def open_later(self, stream: StreamId, replay_endpoint: str | None) -> None:
        """As `open`, without waiting for it; for the subscriber's thread."""
        self._worker(stream.pod).put_always(
            Control(lambda worker: worker.open(stream, replay_endpoint), threading.Event())
        )

    def forget(self, pod: str) -> None:
        """Drop the pod's streams and clear the pod."""
        self._run(pod, lambda worker: worker.forget(pod))

    def reset(self, pod: str) -> None:
        """Clear the pod and expect a new generation of it."""
        self._run(pod, lambda worker: worker.reset(pod))

    def expire(self, silent_since: float) -> list[str]:
        """Reset the pods not heard since a time on the monotonic clock; returns their names."""
        silent: set[str] = set()
        for worker in self._workers:
            silent |= worker.silent_pods(silent_since)
        for pod in silent:
            self.counters.add("expirations", pod=pod)
            self.reset(pod)
        return sorted(silent)

    def states(self) -> dict[str, list[StreamState]]:
        """Return the states of the streams of every pod that has one."""
        states: dict[str, list[StreamState]] = {}
        for worker in self._workers:
            for stream in worker.all_streams():
                states.setdefault(stream.id.pod, []).append(stream.recovery.state)
        return states

    def wait_applied(self, pod: str, seq: int, timeout: float) -> None:
        """Wait until every stream of the pod has entered message `seq` and is not recovering.

        Raises:
            DeadlineExceededError: that did not happen in time.
        """
        deadline = time.monotonic() + timeout
        worker = self._worker(pod)
        with worker.progress:
            while not worker.has_applied(pod, seq):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    streams = [(s.id, s.recovery.expected, s.recovery.state) for s in worker.streams_of(pod)]
                    raise DeadlineExceededError(f"message {seq} of pod {pod!r} not in after {timeout} s: {streams}")
                worker.progress.wait(min(remaining, WAKE_S))

    def _start_replay(self, stream: StreamId, endpoint: str, start_seq: int, generation: int) -> None:
        with self._lock:
            is_queued = stream in self._wanted  # then an earlier generation wants it, and will not need it any more
            self._wanted[stream] = _WantedReplay(endpoint, start_seq, generation)
        if is_queued:
            return
        try:
            self._replays.submit(self._replay_next, stream)
        except RuntimeError:  # shutting down
            logger.debug("kv replay not started: pool is closed pod=%s", stream.pod)

    def _replay_next(self, stream: StreamId) -> None:
        with self._lock:
            wanted = self._wanted.pop(stream)
        self._worker(stream.pod).put_always(self._replay(stream, wanted))

    def _replay(self, stream: StreamId, wanted: _WantedReplay) -> Replayed:
        try:
            result = ReplayClient(wanted.endpoint, self.replay_timeout_s).replay(wanted.start_seq)
        except KVBlocksError as error:
            logger.warning("kv replay failed pod=%s endpoint=%s: %s", stream.pod, wanted.endpoint, error)
            return Replayed(stream, wanted.generation, None, complete=False)
        except Exception:  # thread boundary
            logger.exception("kv replay failed pod=%s endpoint=%s", stream.pod, wanted.endpoint)
            return Replayed(stream, wanted.generation, None, complete=False)
        messages = tuple(EventMessage(frame.topic, frame.seq, frame.payload) for frame in result.frames)
        return Replayed(stream, wanted.generation, messages, result.complete)

    def _worker(self, pod: str) -> Worker:
        return self._workers[shard_of(pod, len(self._workers))]

    def _run(self, pod: str, action: Callable[[Worker], None]) -> None:
        """Run an action on the pod's worker, after all that is queued; wait for it.

        A worker that has failed runs nothing: its pods are cleared already, and stay degraded.
        """
        worker = self._worker(pod)
        done = threading.Event()
        if not worker.put_always(Control(action, done)):
            return
        with self._lock:
            is_running = self._is_started and not self._is_closed
        if not is_running:
            return  # it will run first thing after start
        if not done.wait(_CLOSE_TIMEOUT_S):
            raise DeadlineExceededError(f"the event worker of pod {pod!r} did not answer within {_CLOSE_TIMEOUT_S} s")
