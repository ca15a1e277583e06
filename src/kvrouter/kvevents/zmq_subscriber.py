"""One thread that reads the event sockets of all pods.

Each endpoint has a SUB socket of its own, so that every message's origin is known: sequence numbers count per origin.
ZMQ reconnects by itself; what was missed meanwhile shows in the numbers.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final, TypeAlias

import zmq

from kvrouter.errors import EndpointError
from kvrouter.kvevents.adapters import EventMessage, parse_message

logger = logging.getLogger(__name__)

_RECEIVE_HWM: Final = 100_000
_RECONNECT_MS: Final = 100
_RECONNECT_MAX_MS: Final = 2_000
_CLOSE_TIMEOUT_S: Final = 5.0
_MAX_BURST: Final = 256
"""Messages taken from one socket before the others get their turn."""

OnMessage: TypeAlias = "Callable[[EventMessage | None], None]"
"""Called in the subscriber's thread for each message, with None for one that is malformed; must not block."""


class ZmqSubscriber:
    """Reads any number of endpoints; `add` and `remove` may be called from any thread, before or after `start`."""

    def __init__(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Make a subscriber without endpoints; its thread calls `on_failure` if it can read no more, and ends."""
        self._on_failure: Final = on_failure
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._thread: Final = threading.Thread(target=self._run, name="kv-event-subscriber", daemon=True)
        self._lock: Final = threading.Lock()
        # Protected by _lock:
        # One entry per call of `add` or `remove`, which are few; the thread never blocks and takes all at once.
        self._changes: list[tuple[str, tuple[zmq.Socket[bytes], OnMessage] | None]] = []  # None: remove
        self._is_started = False
        self._is_closed = False
        self._is_failed = False
        # Owned by the thread:
        self._sockets: dict[str, tuple[zmq.Socket[bytes], OnMessage]] = {}

    def start(self) -> None:
        """Start reading; a second call does nothing."""
        with self._lock:
            if not self._is_started and not self._is_closed:
                self._is_started = True
                self._thread.start()

    @property
    def is_failed(self) -> bool:
        """Whether its thread has ended on an error: nothing is read any more."""
        with self._lock:
            return self._is_failed

    def close(self) -> None:
        """Stop reading and close all sockets; a second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            was_started = self._is_started
        if was_started:
            self._wake()
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                logger.error("kv event subscriber did not end")
                return
        for _, entry in self._changes:
            if entry is not None:
                entry[0].close(linger=0)
        self._wake_receiver.close()
        self._wake_sender.close()

    def add(self, endpoint: str, on_message: OnMessage, *, topic_filter: str = "", bind: bool = False) -> str:
        """Subscribe to an endpoint; returns its address, when bound with the port that was really taken.

        Raises:
            EndpointError: no address, or it cannot be bound, or the subscriber is closed or has failed.
        """
        sub: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        try:
            sub.setsockopt(zmq.RCVHWM, _RECEIVE_HWM)
            sub.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
            sub.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
            sub.setsockopt(zmq.TCP_KEEPALIVE, 1)
            sub.setsockopt(zmq.SUBSCRIBE, topic_filter.encode())
            if bind:
                sub.bind(endpoint)
            else:
                sub.connect(endpoint)
        except zmq.ZMQError as error:
            sub.close(linger=0)
            verb = "bind" if bind else "connect to"
            raise EndpointError(f"cannot {verb} the event endpoint {endpoint!r}: {error}") from error
        address = sub.getsockopt_string(zmq.LAST_ENDPOINT) if bind else endpoint
        with self._lock:
            if self._is_closed or self._is_failed:
                sub.close(linger=0)
                why = "is closed" if self._is_closed else "has failed"
                raise EndpointError(f"cannot subscribe to {endpoint!r}: the subscriber {why}")
            # The lock hands the socket over to the thread; nobody else touches it from here on.
            self._changes.append((address, (sub, on_message)))
        self._wake()
        return address

    def remove(self, address: str) -> None:
        """Stop reading an address that `add` returned; messages taken already may still be delivered."""
        with self._lock:
            if self._is_failed:
                return
            self._changes.append((address, None))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full of wake-ups to come, or closed
            self._wake_sender.send(b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_receiver, zmq.POLLIN)
        try:
            while self._update(poller):
                ready = dict(poller.poll())  # for a message, or for `add`, `remove` or `close`, which wake it
                for sub, on_message in list(self._sockets.values()):
                    if sub in ready:
                        _drain(sub, on_message)
        except Exception:  # thread boundary: what the pods do from now on is not known
            logger.exception("kv event subscriber failed; the index knows nothing of its pods from now on")
            with self._lock:
                self._is_failed = True
            self._on_failure()
        finally:
            for sub, _ in self._sockets.values():
                sub.close(linger=0)

    def _update(self, poller: zmq.Poller) -> bool:
        """Take sockets over and close removed ones; False when the subscriber is to end."""
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        with self._lock:
            changes, self._changes = self._changes, []
            is_closed = self._is_closed
        for address, entry in changes:
            old = self._sockets.pop(address, None)
            if old is not None:
                poller.unregister(old[0])
                old[0].close(linger=0)
            if entry is not None:
                self._sockets[address] = entry
                poller.register(entry[0], zmq.POLLIN)
        return not is_closed


def _drain(sub: zmq.Socket[bytes], on_message: OnMessage) -> None:
    for _ in range(_MAX_BURST):
        try:
            frames = sub.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        on_message(parse_message(frames))
