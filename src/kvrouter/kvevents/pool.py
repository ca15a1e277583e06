"""Workers that enter events into the index, in order per pod.

    subscriber thread --put()--> queue of worker FNV-1a(pod) % concurrency  (bounded; full: dropped, which is a gap)
    any thread --control--> the same queue                                   (few, never dropped)
    replay threads --result--> the same queue

Everything about a stream belongs to the one worker of its pod, so streams need no locks. Replays run on threads of
their own, so that an engine that does not answer holds up nobody else's events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kvblocks.errors import KVBlocksError
from kvblocks.replay import ReplayClient
from kvrouter.errors import ConfigError, DeadlineExceededError
from kvrouter.kvblock.base import EventApplier, Index
from kvrouter.kvevents.adapters import EventMessage
from kvrouter.kvevents.counters import EventCounters
from kvrouter.kvevents.recovery import Action, Input, StreamRecovery, StreamState

logger = logging.getLogger(__name__)

_WAKE_S: Final = 1.0
_CLOSE_TIMEOUT_S: Final = 5.0
_NUM_REPLAY_THREADS: Final = 4


def shard_of(pod: str, num_shards: int) -> int:
    """Return the worker of a pod: FNV-1a (32 bits) of its name, modulo the number of workers."""
    digest = 0x811C9DC5
    for byte in pod.encode():
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return digest % num_shards


@dataclass(frozen=True, slots=True)
class StreamId:
    """One publisher's stream of events.

    Attributes:
        pod: whose blocks it announces.
        model: of which model.
        source: the endpoint it comes from; sequence numbers are counted per source.
    """

    pod: str
    model: str
    source: str


@dataclass(slots=True)
class _Stream:
    """What a worker knows of a stream."""

    id: StreamId
    replay_endpoint: str | None
    recovery: StreamRecovery = field(default_factory=StreamRecovery)
    rank: int | None = None  # of the batches entered so far
    last_heard: float = 0.0


@dataclass(frozen=True, slots=True)
class _Live:
    stream: StreamId
    message: EventMessage


@dataclass(frozen=True, slots=True)
class _Replayed:
    stream: StreamId
    generation: int
    messages: tuple[EventMessage, ...] | None  # None: the replay failed
    complete: bool


@dataclass(frozen=True, slots=True)
class _Control:
    run: Callable[[_Worker], None]
    done: threading.Event


_Item: TypeAlias = "_Live | _Replayed | _Control"


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
        self._index: Final = index
        self._workers: Final = [_Worker(self, index, applier, i, queue_size) for i in range(concurrency)]
        self._replays: Final = ThreadPoolExecutor(_NUM_REPLAY_THREADS, thread_name_prefix="kv-replay")
        self._lock: Final = threading.Lock()
        self._is_started = False  # protected by _lock
        self._is_closed = False  # protected by _lock

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

    def put(self, stream: StreamId, message: EventMessage) -> bool:
        """Queue a live message; False if there was no room, which the worker will treat as a gap."""
        return self._worker(stream.pod).put(_Live(stream, message))

    def open(self, stream: StreamId, replay_endpoint: str | None) -> None:
        """Announce a stream, and fetch what its publisher said before."""
        self._run(stream.pod, lambda worker: worker.open(stream, replay_endpoint))

    def open_later(self, stream: StreamId, replay_endpoint: str | None) -> None:
        """As `open`, without waiting for it; for the subscriber's thread."""
        self._worker(stream.pod).put_always(
            _Control(lambda worker: worker.open(stream, replay_endpoint), threading.Event())
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

    def states(self, pod: str) -> list[StreamState]:
        """Return the states of the pod's streams."""
        return [stream.recovery.state for stream in self._worker(pod).streams_of(pod)]

    def pods(self) -> set[str]:
        """Return the pods that have streams."""
        return {stream.id.pod for worker in self._workers for stream in worker.all_streams()}

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
                worker.progress.wait(min(remaining, _WAKE_S))

    def request_replay(self, stream: StreamId, endpoint: str, start_seq: int, generation: int) -> None:
        """Fetch messages from `start_seq` on; the result goes to the stream's worker."""

        def run() -> None:
            result = self._replay(stream, endpoint, start_seq, generation)
            self._worker(stream.pod).put_always(result)

        try:
            self._replays.submit(run)
        except RuntimeError:  # shutting down
            logger.debug("kv replay not started: pool is closed pod=%s", stream.pod)

    def _replay(self, stream: StreamId, endpoint: str, start_seq: int, generation: int) -> _Replayed:
        try:
            result = ReplayClient(endpoint, self.replay_timeout_s).replay(start_seq)
        except KVBlocksError as error:
            logger.warning("kv replay failed pod=%s endpoint=%s: %s", stream.pod, endpoint, error)
            return _Replayed(stream, generation, None, complete=False)
        except Exception:  # thread boundary
            logger.exception("kv replay failed pod=%s endpoint=%s", stream.pod, endpoint)
            return _Replayed(stream, generation, None, complete=False)
        messages = tuple(EventMessage(frame.topic, frame.seq, frame.payload) for frame in result.frames)
        return _Replayed(stream, generation, messages, result.complete)

    def _worker(self, pod: str) -> _Worker:
        return self._workers[shard_of(pod, len(self._workers))]

    def _run(self, pod: str, action: Callable[[_Worker], None]) -> None:
        """Run an action on the pod's worker, after all that is queued; wait for it."""
        worker = self._worker(pod)
        done = threading.Event()
        worker.put_always(_Control(action, done))
        with self._lock:
            is_running = self._is_started and not self._is_closed
        if not is_running:
            return  # it will run first thing after start
        if not done.wait(_CLOSE_TIMEOUT_S):
            raise DeadlineExceededError(f"the event worker of pod {pod!r} did not answer within {_CLOSE_TIMEOUT_S} s")


class _Worker:
    """One thread, its queue and its streams."""

    def __init__(self, pool: EventPool, index: Index, applier: EventApplier, number: int, queue_size: int) -> None:
        self.thread: Final = threading.Thread(target=self._run, name=f"kv-events-{number}", daemon=True)
        self.progress: Final = threading.Condition()
        self._pool: Final = pool
        self._index: Final = index
        self._applier: Final = applier
        self._queue_size: Final = queue_size
        self._wake: Final = threading.Condition()
        # Protected by _wake:
        self._queue: deque[_Item] = deque()
        self._overflowed: set[StreamId] = set()
        self._is_stopped = False
        # Written by the thread alone; readers see one attribute at a time:
        self._streams: dict[StreamId, _Stream] = {}

    # Called from other threads.

    def put(self, item: _Live) -> bool:
        with self._wake:
            if len(self._queue) >= self._queue_size:
                self._overflowed.add(item.stream)
                return False
            self._queue.append(item)
            if len(self._queue) == 1:
                self._wake.notify()
            return True

    def put_always(self, item: _Replayed | _Control) -> None:
        with self._wake:
            self._queue.append(item)
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._is_stopped = True
            self._wake.notify()

    def all_streams(self) -> list[_Stream]:
        return list(self._streams.values())

    def streams_of(self, pod: str) -> list[_Stream]:
        return [stream for stream in self.all_streams() if stream.id.pod == pod]

    def has_applied(self, pod: str, seq: int) -> bool:
        streams = self.streams_of(pod)
        settled = (StreamState.LIVE, StreamState.DEGRADED)
        return bool(streams) and all(s.recovery.expected > seq and s.recovery.state in settled for s in streams)

    def silent_pods(self, silent_since: float) -> set[str]:
        heard: dict[str, float] = {}
        for stream in self.all_streams():
            heard[stream.id.pod] = max(heard.get(stream.id.pod, 0.0), stream.last_heard)
        return {pod for pod, last in heard.items() if last < silent_since}

    # Controls, run by the thread.

    def open(self, stream_id: StreamId, replay_endpoint: str | None) -> None:
        if stream_id in self._streams:
            self._streams[stream_id].replay_endpoint = replay_endpoint
            return
        stream = self._add_stream(stream_id, replay_endpoint)
        if replay_endpoint is not None:
            self._do(stream, stream.recovery.feed(Input.START), None)

    def forget(self, pod: str) -> None:
        self._streams = {stream_id: stream for stream_id, stream in self._streams.items() if stream_id.pod != pod}
        self._index.clear(pod)

    def reset(self, pod: str) -> None:
        for stream in self.streams_of(pod):
            stream.recovery.feed(Input.RESET)
            stream.recovery.restart()
            stream.rank = None
        self._index.clear(pod)

    # The thread.

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                items, overflowed = taken
                for item in items:
                    self._handle(item)
                for stream_id in overflowed:
                    self._on_overflow(stream_id)
                with self.progress:
                    self.progress.notify_all()
        except Exception:  # thread boundary: what these pods hold is no longer known
            logger.exception("kv event worker failed name=%s", self.thread.name)
            for stream in self.all_streams():
                stream.recovery.state = StreamState.DEGRADED
                self._index.clear(stream.id.pod)

    def _take(self) -> tuple[deque[_Item], set[StreamId]] | None:
        with self._wake:
            while not self._queue and not self._overflowed and not self._is_stopped:
                self._wake.wait(_WAKE_S)
            if self._is_stopped:
                return None
            items, self._queue = self._queue, deque()
            overflowed, self._overflowed = self._overflowed, set()
            return items, overflowed

    def _handle(self, item: _Item) -> None:
        if isinstance(item, _Live):
            self._on_live(item)
        elif isinstance(item, _Replayed):
            self._on_replayed(item)
        else:
            try:
                item.run(self)
            finally:
                item.done.set()

    def _on_live(self, item: _Live) -> None:
        stream = self._streams.get(item.stream)
        if stream is None:
            return  # removed while this message was queued
        stream.last_heard = time.monotonic()
        self._pool.counters.add("messages")
        generation = stream.recovery.generation
        was_live = stream.recovery.state
        actions = stream.recovery.on_live(item.message)
        if stream.recovery.generation != generation:
            self._pool.counters.add("generations", pod=stream.id.pod)
            logger.info("kv publisher restarted pod=%s seq=%d", stream.id.pod, item.message.seq)
        if Action.REQUEST_REPLAY in actions and was_live is not stream.recovery.state:
            self._pool.counters.add("gaps", pod=stream.id.pod)
        self._do(stream, actions, item.message)

    def _on_overflow(self, stream_id: StreamId) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        self._pool.counters.add("gaps", pod=stream_id.pod)
        self._do(stream, stream.recovery.feed(Input.GAP), None)

    def _on_replayed(self, item: _Replayed) -> None:
        stream = self._streams.get(item.stream)
        if stream is None or stream.recovery.generation != item.generation:
            return  # removed or restarted since
        self._finish_replay(stream, item.messages, complete=item.complete)

    def _finish_replay(self, stream: _Stream, messages: tuple[EventMessage, ...] | None, *, complete: bool) -> None:
        happened = stream.recovery.judge_replay(messages, complete=complete)
        if messages is None and happened is not Input.NOTHING_YET:
            self._pool.counters.add("replays_failed", pod=stream.id.pod)
        if happened is Input.HISTORY_LOST:
            self._pool.counters.add("histories_lost", pod=stream.id.pod)
            logger.warning("kv history lost pod=%s source=%s", stream.id.pod, stream.id.source)
        for action in stream.recovery.feed(happened):
            if action is Action.CLEAR:
                self._clear(stream)
            elif action is Action.RELEASE:
                self._release(stream, messages or (), complete=complete)

    def _release(self, stream: _Stream, replayed: tuple[EventMessage, ...], *, complete: bool) -> None:
        num_held = len(stream.recovery.held)
        num_from_hold = 0
        last_replayed = replayed[-1].seq if replayed else -1
        for step in stream.recovery.release(replayed, complete=complete):
            if isinstance(step, Action):
                self._request_replay(stream)
                return
            num_from_hold += step.seq > last_replayed
            self._pool.counters.add("replayed_messages", int(step.seq <= last_replayed))
            self._apply(stream, step)
        seen = num_held - num_from_hold - len(stream.recovery.held)
        logger.info("kv stream recovered pod=%s state=%s dropped=%d", stream.id.pod, stream.recovery.state.value, seen)

    def _do(self, stream: _Stream, actions: tuple[Action, ...], message: EventMessage | None) -> None:
        for action in actions:
            if action is Action.CLEAR:
                self._clear(stream)
            elif action is Action.REQUEST_REPLAY:
                self._request_replay(stream)
            elif action is Action.APPLY:
                assert message is not None
                stream.recovery.expected = message.seq + 1
                self._apply(stream, message)

    def _clear(self, stream: _Stream) -> None:
        self._pool.counters.add("pods_cleared")
        self._index.clear(stream.id.pod, stream.rank)

    def _request_replay(self, stream: _Stream) -> None:
        recovery = stream.recovery
        if stream.replay_endpoint is None:
            self._finish_replay(stream, None, complete=False)
            return
        self._pool.counters.add("replays")
        self._pool.request_replay(stream.id, stream.replay_endpoint, recovery.expected, recovery.generation)

    def _apply(self, stream: _Stream, message: EventMessage) -> None:
        result = self._applier.apply(stream.id.pod, stream.id.model, message.payload)
        counters = self._pool.counters
        counters.add("blocks_stored", result.num_stored)
        counters.add("blocks_removed", result.num_removed)
        for kind, count in result.rejected.items():
            counters.add(kind, count, pod=stream.id.pod)
        if "malformed_batch" not in result.rejected:
            stream.rank = result.rank
        stream.recovery.note_batch(
            cleared=result.num_cleared > 0, has_unknown_parents="unknown_parent" in result.rejected
        )

    def _add_stream(self, stream_id: StreamId, replay_endpoint: str | None) -> _Stream:
        stream = _Stream(stream_id, replay_endpoint, last_heard=time.monotonic())
        self._streams = {**self._streams, stream_id: stream}
        return stream
