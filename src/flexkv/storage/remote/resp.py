"""The wire of Redis, for large values: redis-py makes the connections, this reads and writes on them.

    get    *2 $3 GET $n <key>                    ->  $len CRLF <header><payload> CRLF, or $-1
    put    *3 $3 SET $n <key> $len <header><payload>   ->  +OK, or -ERROR

redis-py would join header and payload for a write, and collect a reply in its own buffer before it becomes an object.
Here both go between the socket and the caller's buffer; the first bytes of a payload, which arrive together with the
line before it, are the only ones copied (at most `_READ_BYTES`). Every wait on the socket ends by the deadline, also
when the server sends a byte now and then.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Any, Final

from flexkv.storage.remote.base import RemoteStoreError, time_left

_READ_BYTES: Final = 16 * 1024
_LONGEST_LINE: Final = 64 * 1024
_LARGEST_REPLY: Final = 512 * 2**20
_TRANSIENT: Final = ("LOADING", "BUSY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN")

Reply = bytes | int | None | list[Any] | RemoteStoreError


class RespWire:
    """Sends commands and reads replies on one connection's socket. Used by one thread at a time.

    Attributes:
        deadline: when every wait on the socket ends; set before each use.
    """

    def __init__(self) -> None:
        """Begin without a socket."""
        self.deadline = float("inf")
        self._sock: socket.socket | None = None
        self._line = bytearray(_READ_BYTES)  # [_begin, _end) has been received and not been used
        self._begin = self._end = 0

    def attach(self, sock: socket.socket) -> None:
        """Speak on `sock` from now on."""
        self._sock = sock
        self._begin = self._end = 0

    def detach(self) -> None:
        """Forget the socket."""
        self._sock = None

    @property
    def is_attached(self) -> bool:
        """Whether there is a socket."""
        return self._sock is not None

    def can_read(self, timeout: float = 0.0) -> bool:
        """Return whether the server has sent something, or closed the connection."""
        if self._begin < self._end:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send buffers one after another, large ones without a copy.

        Raises:
            OSError: the socket fails; `TimeoutError` at the deadline.
        """
        for part in parts:
            view = memoryview(part)
            while view:
                self._socket.settimeout(time_left(self.deadline))
                view = view[self._socket.send(view) :]

    def read_reply(self) -> Reply:
        """Return the next reply; a refusal is returned, not raised, because further replies follow it."""
        line = self._read_line()
        kind, text = line[:1], line[1:]
        match kind:
            case b"+":
                return text
            case b"-":
                return refusal(text)
            case b":":
                return _integer(text)
            case b"$":
                size = _integer(text)
                return None if size < 0 else self._read_bulk(size)
            case b"*":
                return [self.read_reply() for _ in range(_integer(text))]
        raise RemoteStoreError(f"the Redis server sent {line[:40]!r}, which is no reply")

    def read_value(self, header: memoryview, payload: memoryview) -> bool | RemoteStoreError | None:
        """Read the reply to a GET: True when it fills both buffers, False when its size is another, None for no value.

        A refusal is returned, as by `read_reply`.
        """
        line = self._read_line()
        if line[:1] == b"-":
            return refusal(line[1:])
        if line[:1] != b"$":
            raise RemoteStoreError(f"the Redis server sent {line[:40]!r} in reply to a GET")
        size = _integer(line[1:])
        if size < 0:
            return None
        if size != header.nbytes + payload.nbytes:
            self._skip(size + 2)
            return False
        self._read_into(header)
        self._read_into(payload)
        self._skip(2)
        return True

    @property
    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise ConnectionResetError("the connection to the Redis server is closed")
        return self._sock

    def _read_bulk(self, size: int) -> bytes:
        if size > _LARGEST_REPLY:
            raise RemoteStoreError(f"the Redis server announces a reply of {size} bytes")
        data = bytearray(size)
        self._read_into(memoryview(data))
        self._skip(2)
        return bytes(data)

    def _read_line(self) -> bytes:
        """Return what is before the next CRLF."""
        line = b""
        while True:
            held = bytes(self._line[self._begin : self._end])
            end = (line + held).find(b"\r\n")
            if end >= 0:
                self._begin += end + 2 - len(line)
                return (line + held)[:end]
            line += held
            if len(line) > _LONGEST_LINE:
                raise RemoteStoreError("the Redis server sends a line without end")
            self._begin = 0
            self._end = self._receive(memoryview(self._line))

    def _read_into(self, target: memoryview) -> None:
        held = min(self._end - self._begin, target.nbytes)
        target[:held] = memoryview(self._line)[self._begin : self._begin + held]
        self._begin += held
        while held < target.nbytes:
            held += self._receive(target[held:])

    def _skip(self, size: int) -> None:
        while size > 0:
            if self._begin == self._end:
                self._begin, self._end = 0, self._receive(memoryview(self._line))
            step = min(size, self._end - self._begin)
            self._begin += step
            size -= step

    def _receive(self, target: memoryview) -> int:
        """Receive at least one byte."""
        self._socket.settimeout(time_left(self.deadline))
        count = self._socket.recv_into(target)
        if count == 0:
            raise ConnectionResetError("the Redis server has closed the connection")
        return count


def command(*parts: bytes, last_bytes: int | None = None) -> bytes:
    """Return a command; with `last_bytes`, all of it but its last argument of so many bytes, and the CRLF after it."""
    count = len(parts) + (last_bytes is not None)
    packed = b"".join([b"*%d\r\n" % count, *(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)])
    return packed if last_bytes is None else packed + b"$%d\r\n" % last_bytes


def refusal(text: bytes) -> RemoteStoreError:
    """Return an error reply of the server as an error."""
    message = text.decode("utf-8", "replace")
    is_transient = message.split(" ", 1)[0] in _TRANSIENT
    return RemoteStoreError(f"the Redis server refuses: {message}", is_transient=is_transient)


def _integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise RemoteStoreError(f"the Redis server sent {text[:40]!r} for a number") from None
