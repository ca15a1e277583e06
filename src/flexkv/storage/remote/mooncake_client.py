"""Our end of a Mooncake client process: starting it, its lanes, ending it."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from flexkv.common.memory_handle import SharedMemory
from flexkv.errors import FlexKVError
from flexkv.storage.remote.base import RemoteStoreError, RemoteTimeoutError, time_left
from flexkv.storage.remote.mooncake_wire import (
    HELLO_ID,
    ClientConfig,
    FrameReader,
    LaneOp,
    LaneReply,
    LaneRequest,
    frame,
    slot_offsets,
)

logger = logging.getLogger(__name__)

_LAST_WORDS_S: Final = 0.2
STOP_S: Final = 5.0
"""How long a client process may take to leave its cluster."""


class MooncakeClient:
    """A client process, and the lanes to it. Thread-safe."""

    def __init__(self, config: ClientConfig, num_lanes: int) -> None:
        """Start the process; its lanes answer once it has joined its cluster.

        Raises:
            RemoteStoreError: it cannot be started.
        """
        self.is_dead = False
        self._last_words = "it had nothing to say"
        self._lock = threading.Lock()
        self._free = threading.Semaphore(num_lanes)
        self._lanes: deque[Lane] = deque()  # idle ones, protected by _lock; those that owe nothing on the right
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                self._memory = SharedMemory.create(config.lane_bytes * num_lanes)
                ours.callback(self._memory.close)
                self._control, their_control = (ours.enter_context(s) for s in socket.socketpair())
                theirs.enter_context(their_control)
                fds = [theirs.enter_context(self._make_lane(i, config.lane_bytes, ours)) for i in range(num_lanes)]
                self._all_lanes = tuple(self._lanes)
                self._memory.send(self._control)
                self._process = _start(config, their_control.fileno(), tuple(fd.fileno() for fd in fds))
                self._log_thread = threading.Thread(target=self._log, name="flexkv-mooncake-log", daemon=True)
                self._log_thread.start()
            except (OSError, FlexKVError) as error:
                raise RemoteStoreError(f"the Mooncake client process cannot be started: {error}") from error
            ours.pop_all()

    def _make_lane(self, index: int, lane_bytes: int, owner: contextlib.ExitStack) -> socket.socket:
        """Make a lane; return the process's end of it."""
        ours, theirs = socket.socketpair()
        owner.enter_context(ours)
        begin = index * lane_bytes
        self._lanes.append(Lane(ours, self._memory.array()[begin : begin + lane_bytes], self._ended))
        return theirs

    def take(self, deadline: float) -> Lane:
        """Return a lane that is free to be asked.

        Raises:
            RemoteTimeoutError: there is none before the deadline.
            RemoteStoreError: the process has ended.
        """
        if not self._free.acquire(timeout=time_left(deadline)):
            raise RemoteTimeoutError("all lanes to the Mooncake client are busy")
        with self._lock:
            lane = self._lanes.pop()
        try:
            lane.settle(deadline)
        except RemoteStoreError:
            self.give_back(lane)
            raise
        return lane

    def give_back(self, lane: Lane) -> None:
        """Put a lane back."""
        with self._lock:
            if lane.owes:
                self._lanes.appendleft(lane)
            else:
                self._lanes.append(lane)
        self._free.release()

    def close(self, wait_s: float = STOP_S) -> None:
        """End the process, by force after `wait_s`, and give its memory back. Idempotent; calls under way fail."""
        self.is_dead = True
        self._control.close()
        if not any(lane.has_answered for lane in self._all_lanes):
            wait_s = 0.0  # it has lent the cluster nothing, and while it tries to join, it hears nothing
        for lane in self._all_lanes:
            lane.hang_up()
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log_thread.join()
        self._memory.close()

    def _ended(self) -> RemoteStoreError:
        """Note that the process has gone; return the error that says so, with its last words."""
        self.is_dead = True
        self._log_thread.join(_LAST_WORDS_S)
        return RemoteStoreError(f"the Mooncake client process has ended; {self._last_words}", is_transient=True)

    def _log(self) -> None:
        """Log what the process and its library write to stderr, until it ends."""
        lines = self._process.stderr
        assert lines is not None
        with lines:
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip()
                self._last_words = f"its last words: {text[:300]!r}"
                logger.debug("mooncake client: %s", text)


class Lane:
    """One request at a time; used by one thread at a time."""

    def __init__(
        self, sock: socket.socket, memory: npt.NDArray[np.uint8], on_end: Callable[[], RemoteStoreError]
    ) -> None:
        """Speak over `sock` about `memory`; `on_end` is asked for the error to raise when the peer has gone."""
        self._sock = sock
        self._memory = memory
        self._on_end = on_end
        self._frames = FrameReader(sock)
        self._decoder = msgspec.msgpack.Decoder(LaneReply)
        self._request_id = HELLO_ID
        self._unsent = b""
        self.owes = True
        """Whether a reply is still to come; until then the memory is the client's."""
        self.has_answered = False
        """Whether any reply has come, the first being that the client has joined its cluster."""

    def slots(self, sizes: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """Return the memory of a request's values."""
        return [self._memory[offset : offset + size] for offset, size in zip(slot_offsets(sizes), sizes, strict=True)]

    def settle(self, deadline: float) -> None:
        """Wait for the reply that is owed, and drop it.

        Raises:
            RemoteTimeoutError: it has not come.
            RemoteStoreError: the process has ended.
        """
        if self.owes:
            self._receive(deadline)

    def ask(self, op: LaneOp, keys: list[str], sizes: list[int], deadline: float) -> list[int]:
        """Return Mooncake's code for each key.

        Raises:
            RemoteTimeoutError: they have not come in time; the lane owes them.
            RemoteStoreError: the process has ended.
        """
        self._request_id += 1
        self.owes = True
        self._unsent = frame(LaneRequest(self._request_id, op, keys, sizes))
        return self._receive(deadline)

    def hang_up(self) -> None:
        """Close the socket, whoever waits on it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _receive(self, deadline: float) -> list[int]:
        while True:
            try:
                while self._unsent:
                    self._sock.settimeout(time_left(deadline))
                    self._unsent = self._unsent[self._sock.send(self._unsent) :]
                self._sock.settimeout(time_left(deadline))
                body = self._frames.read()
            except TimeoutError:
                raise RemoteTimeoutError("the Mooncake client has not answered in time") from None
            except OSError as error:
                raise self._on_end() from error
            if body is None:
                raise self._on_end()
            reply = self._decoder.decode(body)
            if reply.request_id == self._request_id:
                self.owes = False
                self.has_answered = True
                return reply.codes


def _start(config: ClientConfig, control_fd: int, lane_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    config = msgspec.structs.replace(config, control_fd=control_fd, lane_fds=lane_fds)
    return subprocess.Popen(
        [sys.executable, "-m", "flexkv.storage.remote.mooncake_process", msgspec.json.encode(config).decode()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(control_fd, *lane_fds),
        start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
    )
