"""What a process and its Mooncake client process say to each other, and the memory they share.

    our process                                       client process (flexkv.storage.remote.mooncake_process)
      lane 0  --socket pair: LaneRequest, LaneReply--   thread 0     all over one MooncakeDistributedStore
      lane 1  --                                   --   thread 1
      control --the memory's descriptor; then nothing, and its end is the order to stop

    shared memory (memfd)      | lane 0: lane_bytes                     | lane 1 ...
    a request's values         | header payload | pad to 64 | header payload | ...      in the order of its keys

One request at a time is under way on a lane; while it is, the lane's memory belongs to the client process.
A frame is its length (u32, little-endian) and a msgpack body.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

_LENGTH: Final = struct.Struct("<I")
_LARGEST_FRAME: Final = 64 * 2**20
_ALIGNMENT: Final = 64
HELLO_ID: Final = 0
"""The request id of the reply that a lane begins with, once the client has reached its master."""


class LaneOp(StrEnum):
    """What a lane can be asked."""

    EXISTS = "exists"
    GET = "get"
    PUT = "put"
    DELETE = "delete"


class LaneRequest(msgspec.Struct, frozen=True, array_like=True):
    """Do `op` for `keys`; the values lie, or shall lie, in the lane's memory at `slot_offsets(sizes)`."""

    request_id: int
    op: LaneOp
    keys: list[str]
    sizes: list[int]


class LaneReply(msgspec.Struct, frozen=True, array_like=True):
    """How it went: Mooncake's code for each key (a size or 0 or 1; negative: an error)."""

    request_id: int
    codes: list[int]


class ClientConfig(msgspec.Struct, frozen=True):
    """How a client process joins its cluster; it gets this as JSON on its command line, with its descriptors.

    Attributes:
        master: `host:port` of the master.
        metadata: where clients find each other's memory: P2PHANDSHAKE, or the URL of a metadata server.
        protocol: tcp or rdma.
        device: RDMA devices, empty for those the library finds.
        local_host: this machine as other clients reach it; empty for the address that packets to the master carry.
        segment_bytes: memory lent to the cluster.
        lane_bytes: memory of one lane.
        control_fd: the process's end of the control socket pair.
        lane_fds: its ends of the lanes.
    """

    master: str
    metadata: str
    protocol: str
    device: str
    local_host: str
    segment_bytes: int
    lane_bytes: int
    control_fd: int = -1
    lane_fds: tuple[int, ...] = ()


def slot_offsets(sizes: Sequence[int]) -> list[int]:
    """Return where the values of these sizes begin in a lane's memory."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += slot_bytes(size)
    return offsets


def slot_bytes(size: int) -> int:
    """Return what a value takes of a lane's memory."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def frame(message: msgspec.Struct) -> bytes:
    """Return a message as it is sent."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Collects frames; what has come of one that is not complete is kept for the next attempt."""

    def __init__(self, sock: socket.socket) -> None:
        """Read from `sock`."""
        self._sock = sock
        self._received = bytearray()

    def read(self) -> bytes | None:
        """Return the next body; None when the peer has gone.

        Raises:
            TimeoutError: the socket's timeout came first; another call goes on where this one stopped.
            OSError: the socket fails.
        """
        while True:
            if len(self._received) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._received)
                if size > _LARGEST_FRAME:
                    raise OSError(f"a frame of {size} bytes was announced")
                end = _LENGTH.size + size
                if len(self._received) >= end:
                    body = bytes(self._received[_LENGTH.size : end])
                    del self._received[:end]
                    return body
            data = self._sock.recv(65536)
            if not data:
                return None
            self._received += data
