"""Events -> ZMQ: a PUB socket for what happens, and a ROUTER socket that replays what a subscriber missed.

    publish    topic | sequence (u64 big-endian, from 0) | batch
    replay     client sends    "" | start sequence
               we answer       "" | topic | sequence | batch     for each buffered batch from the start on
                               "" | ""    | ff*8     | ""        at the end

One thread owns both sockets and the replay buffer:

    caller --publish()--> outbox (bounded; when full the batch is dropped and its sequence number skipped)
                            --> thread "kv-event-publisher" --> PUB, replay buffer <--> ROUTER

Source: vLLM's `ZmqEventPublisher`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from typing import Final, Protocol, Self

import msgspec
import zmq

from kvblocks.errors import PublisherError
from kvblocks.events import KVEventBatch, encode_batch

logger = logging.getLogger(__name__)

END_SEQUENCE: Final = b"\xff" * 8
"""Sequence frame that ends a replay: -1."""

_CLOSE_TIMEOUT_S = 1.0


class EventPublisher(Protocol):
    """Where an engine or a store announces what its cache holds."""

    def start(self) -> None:
        """Open the publisher; a second call does nothing."""

    def publish(self, batch: KVEventBatch) -> None:
        """Hand over a batch, which is not to be changed afterwards; never blocks."""

    def close(self) -> None:
        """Send what is still queued, for a bounded time, and close; a second call does nothing."""


class NullEventPublisher:
    """Announces nothing; for engines whose events are switched off."""

    def start(self) -> None:
        """Do nothing."""

    def publish(self, batch: KVEventBatch) -> None:
        """Forget the batch."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def offset_endpoint(endpoint: str, data_parallel_rank: int) -> str:
    """Return the endpoint of a data-parallel rank: its port plus the rank; for ipc and inproc, a suffix `_dp<rank>`.

    A port that the system chooses (`*` or 0) stays as it is.

    Raises:
        PublisherError: a tcp endpoint without a port.
    """
    if data_parallel_rank == 0:
        return endpoint
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{data_parallel_rank}"
    address, _, port = endpoint.rpartition(":")
    if port in ("*", "0"):
        return endpoint
    if not port.isdigit():
        raise PublisherError(f"endpoint {endpoint!r} has no port; give tcp://HOST:PORT, ipc://PATH or inproc://NAME")
    return f"{address}:{int(port) + data_parallel_rank}"


def binds(endpoint: str) -> bool:
    """Whether a publisher binds `endpoint` (wildcards, ipc, inproc, ports the system chooses) or connects to it."""
    return (
        "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://")) or endpoint.endswith(":0")
    )


class _Outbox:
    """Numbers batches and holds them until the thread takes them; wakes it through a socket that it can poll."""

    def __init__(self, max_size: int) -> None:
        self._lock = threading.Lock()
        # Protected by _lock:
        self._batches: deque[tuple[int, KVEventBatch]] = deque()
        self._next_seq = 0
        self._closed = False
        self._num_dropped = 0
        self._max_size = max_size
        # Constant after construction:
        self.wake_receiver, self._wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

    @property
    def num_dropped(self) -> int:
        with self._lock:
            return self._num_dropped

    def put(self, batch: KVEventBatch) -> bool:
        """Number the batch and queue it; False if there was no room, so that its number will never be sent."""
        with self._lock:
            if self._closed:
                raise PublisherError("publish() after close()")
            seq = self._next_seq
            self._next_seq += 1
            if len(self._batches) >= self._max_size:
                self._num_dropped += 1
                return False
            self._batches.append((seq, batch))
            if len(self._batches) == 1:
                self._wake()
            return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._wake()

    def refuse_all(self) -> None:
        """Drop what is queued and all that comes: nobody will take it any more."""
        with self._lock:
            self._num_dropped += len(self._batches)
            self._batches.clear()
            self._max_size = 0

    def take_all(self) -> tuple[deque[tuple[int, KVEventBatch]], bool]:
        """Return all queued batches with their sequence numbers, and whether the outbox is closed."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                self.wake_receiver.recv(4096)
            taken, self._batches = self._batches, deque()
            return taken, self._closed

    def release(self) -> None:
        self.wake_receiver.close()
        self._wake_sender.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups that the thread has yet to see
            self._wake_sender.send(b"\0")


class ZmqEventPublisher:
    """Publishes event batches by vLLM's protocol; any thread may call it.

    Batches published before `start` wait in the queue. When the queue is full a batch is dropped, counted, and its
    sequence number skipped, so that subscribers see a gap.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        topic: str = "",
        *,
        buffer_steps: int = 10_000,
        hwm: int = 100_000,
        max_queue_size: int = 100_000,
        data_parallel_rank: int = 0,
    ) -> None:
        """Configure a publisher; `start` opens its sockets.

        Args:
            endpoint: `tcp://*:5557` binds, `tcp://host:5557` connects, ipc and inproc bind; see `binds`.
            replay_endpoint: address to bind for replay requests; None for no replay.
            topic: first frame of every message, `kv@<pod>@<model>` for kvrouter.
            buffer_steps: batches kept for replay.
            hwm: messages ZMQ queues per subscriber; beyond it that subscriber loses messages.
            max_queue_size: batches that may wait for the publishing thread.
            data_parallel_rank: offsets both endpoints, and is written into batches that name no rank.

        Raises:
            PublisherError: a size below 1, a negative rank, or an endpoint that no rank can be added to.
        """
        for name, value in (("buffer_steps", buffer_steps), ("hwm", hwm), ("max_queue_size", max_queue_size)):
            if value < 1:
                raise PublisherError(f"{name} is at least 1, not {value}")
        if data_parallel_rank < 0:
            raise PublisherError(f"data_parallel_rank is at least 0, not {data_parallel_rank}")
        self._endpoint = offset_endpoint(endpoint, data_parallel_rank)
        self._replay_endpoint = (
            None if replay_endpoint is None else offset_endpoint(replay_endpoint, data_parallel_rank)
        )
        self._topic: Final = topic.encode()
        self._hwm: Final = hwm
        self._rank: Final = data_parallel_rank
        self._outbox: Final = _Outbox(max_queue_size)
        # Owned by the thread once it runs:
        self._buffer: Final[deque[tuple[int, bytes]]] = deque(maxlen=buffer_steps)
        self._num_failed = 0
        # Protected by _state_lock:
        self._state_lock: Final = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def endpoint(self) -> str:
        """The PUB address; once started and if bound, with the port that was really taken."""
        return self._endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """The address for replay requests; once started, with the port that was really taken."""
        return self._replay_endpoint

    @property
    def num_dropped(self) -> int:
        """Batches that were never sent: no room in the queue, or not encodable."""
        return self._outbox.num_dropped + self._num_failed

    def start(self) -> None:
        """Open the sockets and start the thread; a second call does nothing.

        Raises:
            PublisherError: an endpoint cannot be opened, or the publisher was closed.
        """
        with self._state_lock:
            if self._closed:
                raise PublisherError("start() after close()")
            if self._thread is not None:
                return
            pub, replay = self._open_sockets()
            self._thread = threading.Thread(
                target=self._run, args=(pub, replay), name="kv-event-publisher", daemon=True
            )
            self._thread.start()
        logger.info("kv events publisher started endpoint=%s replay=%s", self._endpoint, self._replay_endpoint)

    def publish(self, batch: KVEventBatch) -> None:
        """Queue a batch, which is not to be changed afterwards; never blocks.

        Raises:
            PublisherError: the publisher was closed.
        """
        if not self._outbox.put(batch) and self.num_dropped == 1:
            logger.warning("kv events dropped: publisher queue full endpoint=%s", self._endpoint)

    def close(self) -> None:
        """Send what is queued, for at most a second, and close the sockets; a second call does nothing.

        The ports are free again a moment later: ZMQ closes in the background.
        """
        with self._state_lock:
            if self._closed:
                return
            self._closed = True
            self._outbox.close()
            if self._thread is not None:
                self._thread.join(2 * _CLOSE_TIMEOUT_S)
                if self._thread.is_alive():
                    logger.error("kv events publisher thread did not end endpoint=%s", self._endpoint)
                    return
            self._outbox.release()

    def __enter__(self) -> Self:
        try:
            self.start()
        except PublisherError:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open_sockets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes] | None]:
        # The shared context: inproc endpoints are found within one context only.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        pub = context.socket(zmq.PUB)
        pub.set_hwm(self._hwm)
        replay = None
        try:
            self._endpoint = _open(pub, self._endpoint, bind=binds(self._endpoint))
            if self._replay_endpoint is not None:
                replay = context.socket(zmq.ROUTER)
                # A ROUTER drops what exceeds the mark of a client: a whole replay must fit, and no more need.
                assert self._buffer.maxlen is not None
                replay.set_hwm(self._buffer.maxlen + 1)
                self._replay_endpoint = _open(replay, self._replay_endpoint, bind=True)
        except PublisherError:
            pub.close(linger=0)
            if replay is not None:
                replay.close(linger=0)
            raise
        return pub, replay

    def _run(self, pub: zmq.Socket[bytes], replay: zmq.Socket[bytes] | None) -> None:
        linger_s = 0.0
        try:
            linger_s = self._serve(pub, replay)
        except Exception:  # thread boundary: the engine lives on, and later batches count as dropped
            logger.exception("kv events publisher failed endpoint=%s", self._endpoint)
            self._outbox.refuse_all()
        finally:
            pub.close(linger=int(linger_s * 1000))
            if replay is not None:
                replay.close(linger=int(linger_s * 1000))

    def _serve(self, pub: zmq.Socket[bytes], replay: zmq.Socket[bytes] | None) -> float:
        """Publish and replay until closed; return the seconds left of the time for closing."""
        poller = zmq.Poller()
        poller.register(self._outbox.wake_receiver, zmq.POLLIN)
        if replay is not None:
            poller.register(replay, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())  # for a batch or a replay request; `close` wakes it too
            batches, closed = self._outbox.take_all()
            deadline = time.monotonic() + _CLOSE_TIMEOUT_S if closed else None
            while batches and (deadline is None or time.monotonic() < deadline):
                self._send(pub, *batches.popleft())
            if deadline is not None:
                if batches:
                    logger.warning("kv events dropped at close num_batches=%d", len(batches))
                return max(0.0, deadline - time.monotonic())
            if replay is not None and replay in ready:
                self._answer_replay(replay)

    def _send(self, pub: zmq.Socket[bytes], seq: int, batch: KVEventBatch) -> None:
        if batch.data_parallel_rank is None:
            batch = msgspec.structs.replace(batch, data_parallel_rank=self._rank)
        try:
            payload = encode_batch(batch)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
            self._num_failed += 1
            logger.exception("kv events batch cannot be encoded seq=%d", seq)
            return
        self._buffer.append((seq, payload))
        pub.send_multipart((self._topic, seq.to_bytes(8, "big"), payload))

    def _answer_replay(self, replay: zmq.Socket[bytes]) -> None:
        request = replay.recv_multipart()
        if len(request) != 3 or request[1] or len(request[2]) != 8:
            logger.warning("kv events replay request ignored: not ['', start as 8 bytes] num_frames=%d", len(request))
            return
        client, _, start = request
        start_seq = int.from_bytes(start, "big")
        for seq, payload in self._buffer:
            if seq >= start_seq:
                replay.send_multipart((client, b"", self._topic, seq.to_bytes(8, "big"), payload))
        replay.send_multipart((client, b"", b"", END_SEQUENCE, b""))


def _open(endpoint_socket: zmq.Socket[bytes], endpoint: str, *, bind: bool) -> str:
    """Bind or connect, and return the address, with the port that was really taken."""
    try:
        if not bind:
            endpoint_socket.connect(endpoint)
            return endpoint
        endpoint_socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise PublisherError(f"cannot {'bind' if bind else 'connect to'} {endpoint!r}: {error}") from error
    return endpoint_socket.getsockopt_string(zmq.LAST_ENDPOINT)
