"""One event worker: a thread, its queue, and the streams of the pods that are its own.

Everything about a stream belongs to the thread, so streams need no locks; other threads read single attributes.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kvrouter.kvblock.base import EventApplier, Index
from kvrouter.kvevents.adapters import EventMessage
from kvrouter.kvevents.counters import EventCounters
from kvrouter.kvevents.recovery import Action, Input, StreamRecovery, StreamState

logger = logging.getLogger(__name__)

WAKE_S: Final = 1.0
"""Longest a thread here sleeps before it looks again."""


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
class Stream:
    """What a worker knows of a stream."""

    id: StreamId
    replay_endpoint: str | None
    recovery: StreamRecovery = field(default_factory=StreamRecovery)
    rank: int | None = None  # of the batches entered so far
    last_heard: float = 0.0


@dataclass(frozen=True, slots=True)
class Live:
    """A live message."""

    stream: StreamId
    message: EventMessage


@dataclass(frozen=True, slots=True)
class Replayed:
    """The end of a replay."""

    stream: StreamId
    generation: int
    messages: tuple[EventMessage, ...] | None  # None: the replay failed
    complete: bool


@dataclass(frozen=True, slots=True)
class Control:
    """Something to run on the worker's thread."""

    run: Callable[[Worker], None]
    done: threading.Event


Item: TypeAlias = "Live | Replayed | Control"

StartReplay: TypeAlias = "Callable[[StreamId, str, int, int], None]"
"""Starts fetching (stream, replay endpoint, first number, generation); a `Replayed` follows in the worker's queue."""


class Worker:
    """One thread, its queue and its streams."""

    def __init__(
        self,
        index: Index,
        applier: EventApplier,
        counters: EventCounters,
        start_replay: StartReplay,
        *,
        number: int,
        queue_size: int,
    ) -> None:
        """Make worker `number`, whose thread is yet to be started."""
        self.thread: Final = threading.Thread(target=self._run, name=f"kv-events-{number}", daemon=True)
        self.progress: Final = threading.Condition()
        self._counters: Final = counters
        self._start_replay: Final = start_replay
        self._index: Final = index
        self._applier: Final = applier
        self._queue_size: Final = queue_size
        self._wake: Final = threading.Condition()
        # Protected by _wake:
        self._queue: deque[Item] = deque()
        self._overflowed: set[StreamId] = set()
        self._is_stopped = False
        self._is_failed = False
        # Written by the thread alone; readers see one attribute at a time:
        self._streams: dict[StreamId, Stream] = {}
        self._incarnations: Final = itertools.count()

    # Called from other threads.

    def put(self, item: Live) -> bool:
        """Queue a live message; False if there was no room, which counts as a gap of its stream."""
        with self._wake:
            if self._is_failed:
                return False
            if len(self._queue) >= self._queue_size:
                self._overflowed.add(item.stream)
                return False
            self._queue.append(item)
            if len(self._queue) == 1:
                self._wake.notify()
            return True

    def put_always(self, item: Replayed | Control) -> bool:
        """Queue what must not be lost; False once the worker has failed, when its pods have no blocks anyway.

        The callers bound it: a stream has one replay that waits and few that run (`EventPool`), a pod's changes are
        made one after another and wait for their control, and a source opens a limited number of streams.
        """
        with self._wake:
            if self._is_failed:
                return False
            self._queue.append(item)
            self._wake.notify()
            return True

    def stop(self) -> None:
        """Let the thread end, dropping what is queued."""
        with self._wake:
            self._is_stopped = True
            self._wake.notify()

    def fail(self) -> None:
        """Let the thread end as failed: nothing of its pods will be heard any more, so it forgets their blocks."""
        with self._wake:
            self._is_stopped = self._is_failed = True
            for item in self._queue:
                if isinstance(item, Control):
                    item.done.set()
            self._queue.clear()
            self._wake.notify()

    def all_streams(self) -> list[Stream]:
        """Return the streams of all its pods."""
        return list(self._streams.values())

    def streams_of(self, pod: str) -> list[Stream]:
        """Return the streams of one pod."""
        return [stream for stream in self.all_streams() if stream.id.pod == pod]

    def has_applied(self, pod: str, seq: int) -> bool:
        """Say whether every stream of the pod is past `seq` and not recovering."""
        streams = self.streams_of(pod)
        settled = (StreamState.LIVE, StreamState.DEGRADED)
        return bool(streams) and all(s.recovery.expected > seq and s.recovery.state in settled for s in streams)

    def silent_pods(self, silent_since: float) -> set[str]:
        """Return the pods not heard since a time on the monotonic clock."""
        heard: dict[str, float] = {}
        for stream in self.all_streams():
            heard[stream.id.pod] = max(heard.get(stream.id.pod, 0.0), stream.last_heard)
        return {pod for pod, last in heard.items() if last < silent_since}

    # Controls, run by the thread.

    def open(self, stream_id: StreamId, replay_endpoint: str | None) -> None:
        """Begin a stream; with a replay endpoint, fetch what was published before."""
        if stream_id in self._streams:
            self._streams[stream_id].replay_endpoint = replay_endpoint
            return
        stream = self._add_stream(stream_id, replay_endpoint)
        if replay_endpoint is not None:
            self._do(stream, stream.recovery.feed(Input.START), None)

    def forget(self, pod: str) -> None:
        """Drop the pod's streams and its blocks."""
        self._streams = {stream_id: stream for stream_id, stream in self._streams.items() if stream_id.pod != pod}
        self._index.clear(pod)

    def reset(self, pod: str) -> None:
        """Drop the pod's blocks and expect a new generation."""
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
            self.fail()
        if self._is_failed:  # set for good
            self._counters.add("workers_failed")
            for stream in self.all_streams():
                stream.recovery.state = StreamState.DEGRADED
            for pod in {stream.id.pod for stream in self.all_streams()}:
                self._index.clear(pod)

    def _take(self) -> tuple[deque[Item], set[StreamId]] | None:
        with self._wake:
            while not self._queue and not self._overflowed and not self._is_stopped:
                self._wake.wait(WAKE_S)
            if self._is_stopped:
                return None
            items, self._queue = self._queue, deque()
            overflowed, self._overflowed = self._overflowed, set()
            return items, overflowed

    def _handle(self, item: Item) -> None:
        if isinstance(item, Live):
            self._on_live(item)
        elif isinstance(item, Replayed):
            self._on_replayed(item)
        else:
            try:
                item.run(self)
            finally:
                item.done.set()

    def _on_live(self, item: Live) -> None:
        stream = self._streams.get(item.stream)
        if stream is None:
            return  # removed while this message was queued
        stream.last_heard = time.monotonic()
        self._counters.add("messages")
        generation = stream.recovery.generation
        was_live = stream.recovery.state
        actions = stream.recovery.on_live(item.message)
        if stream.recovery.generation != generation:
            self._counters.add("generations", pod=stream.id.pod)
            logger.info("kv publisher restarted pod=%s seq=%d", stream.id.pod, item.message.seq)
        if Action.REQUEST_REPLAY in actions and was_live is not stream.recovery.state:
            self._counters.add("gaps", pod=stream.id.pod)
        self._do(stream, actions, item.message)

    def _on_overflow(self, stream_id: StreamId) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        self._counters.add("gaps", pod=stream_id.pod)
        self._do(stream, stream.recovery.feed(Input.GAP), None)

    def _on_replayed(self, item: Replayed) -> None:
        stream = self._streams.get(item.stream)
        if stream is None or stream.recovery.generation != item.generation:
            return  # removed or restarted since
        self._finish_replay(stream, item.messages, complete=item.complete)

    def _finish_replay(self, stream: Stream, messages: tuple[EventMessage, ...] | None, *, complete: bool) -> None:
        happened = stream.recovery.judge_replay(messages, complete=complete)
        if messages is None and happened is not Input.NOTHING_YET:
            self._counters.add("replays_failed", pod=stream.id.pod)
        if happened is Input.HISTORY_LOST:
            self._counters.add("histories_lost", pod=stream.id.pod)
            logger.warning("kv history lost pod=%s source=%s", stream.id.pod, stream.id.source)
        for action in stream.recovery.feed(happened):
            if action is Action.CLEAR:
                self._clear(stream)
            elif action is Action.RELEASE:
                self._release(stream, messages or (), complete=complete)

    def _release(self, stream: Stream, replayed: tuple[EventMessage, ...], *, complete: bool) -> None:
        num_held = len(stream.recovery.held)
        num_from_hold = 0
        last_replayed = replayed[-1].seq if replayed else -1
        for step in stream.recovery.release(replayed, complete=complete):
            if isinstance(step, Action):
                self._request_replay(stream)
                return
            num_from_hold += step.seq > last_replayed
            self._counters.add("replayed_messages", int(step.seq <= last_replayed))
            self._apply(stream, step)
        seen = num_held - num_from_hold - len(stream.recovery.held)
        logger.info("kv stream recovered pod=%s state=%s dropped=%d", stream.id.pod, stream.recovery.state.value, seen)

    def _do(self, stream: Stream, actions: tuple[Action, ...], message: EventMessage | None) -> None:
        for action in actions:
            if action is Action.CLEAR:
                self._clear(stream)
            elif action is Action.REQUEST_REPLAY:
                self._request_replay(stream)
            elif action is Action.APPLY:
                assert message is not None
                stream.recovery.expected = message.seq + 1
                self._apply(stream, message)

    def _clear(self, stream: Stream) -> None:
        self._counters.add("pods_cleared")
        self._index.clear(stream.id.pod, stream.rank)

    def _request_replay(self, stream: Stream) -> None:
        recovery = stream.recovery
        if stream.replay_endpoint is None:
            self._finish_replay(stream, None, complete=False)
            return
        self._counters.add("replays")
        self._start_replay(stream.id, stream.replay_endpoint, recovery.expected, recovery.generation)

    def _apply(self, stream: Stream, message: EventMessage) -> None:
        result = self._applier.apply(stream.id.pod, stream.id.model, message.payload)
        counters = self._counters
        counters.add("blocks_stored", result.num_stored)
        counters.add("blocks_removed", result.num_removed)
        for kind, count in result.rejected.items():
            counters.add(kind, count, pod=stream.id.pod)
        if "malformed_batch" not in result.rejected:
            stream.rank = result.rank
        stream.recovery.note_batch(
            cleared=result.num_cleared > 0, has_unknown_parents="unknown_parent" in result.rejected
        )

    def _add_stream(self, stream_id: StreamId, replay_endpoint: str | None) -> Stream:
        # A pod removed and added again must not take the replay of its earlier stream for its own.
        recovery = StreamRecovery(generation=next(self._incarnations) << 32)
        stream = Stream(stream_id, replay_endpoint, recovery, last_heard=time.monotonic())
        self._streams = {**self._streams, stream_id: stream}
        return stream
