"""The messages on a store's sockets: msgspec structs, one tagged union per direction.

device worker                      store
  Register  ------------------------>       every second until answered
            <---------- Registered | Refused
  (maps the pool, received over the pool socket)
  Ready     ------------------------>
            <---------- CopyOp, CancelOps, AbandonTasks
  OpDone    ------------------------>
  Ping      ------------------------>
            <---------- Pong
  Bye       ------------------------>
            <---------- Closing
"""

from __future__ import annotations

from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 2
HEARTBEAT_S: Final = 1.0
"""Between two Pings, and between two Registers, in seconds."""
SILENCE_S: Final = 10.0
"""A peer from which nothing came for so long is taken for gone, in seconds."""


class Message(msgspec.Struct, tag=True, array_like=True):
    """Base of all messages."""


class Register(Message):
    """A device worker introduces itself."""

    protocol_version: int
    rank: int
    pid: int
    fingerprint: str
    """`DeviceLayout.fingerprint` of its tensors."""
    block_bytes: int
    """Bytes of its slice of a block."""


class Ready(Message):
    """The pool is mapped: ops may come."""


class OpDone(Message):
    """A device op ended on this rank and touches no block any more."""

    op_id: int
    ok: bool
    error: str
    is_data_bad: bool


class Ping(Message):
    """The device worker lives."""


class Bye(Message):
    """The device worker leaves; no copy of it is running."""


class Registered(Message):
    """Accepted: this is the pool, to be fetched from the pool socket."""

    num_blocks: int
    block_bytes: int
    rank_offset: int
    padding: int
    """Bytes between two blocks."""


class Refused(Message):
    """Not accepted, and why."""

    reason: str


class CopyOp(Message):
    """Copy blocks between device and pool; ids are int64 in the machine's byte order."""

    op_id: int
    task_id: int
    num_task_ops: int
    to_device: bool
    device_blocks: bytes
    pool_blocks: bytes
    first_layer: int
    num_layers: int | None
    timeout_s: float


class CancelOps(Message):
    """Drop these ops if they have not begun."""

    op_ids: list[int]


class AbandonTasks(Message):
    """No op of these tasks will come any more."""

    task_ids: list[int]


class Pong(Message):
    """The store lives."""


class Closing(Message):
    """The store goes away; its ops are void."""


FromDevice = Register | Ready | OpDone | Ping | Bye
ToDevice = Registered | Refused | CopyOp | CancelOps | AbandonTasks | Pong | Closing

encode = msgspec.msgpack.Encoder().encode
decode_from_device = msgspec.msgpack.Decoder(FromDevice).decode
decode_to_device = msgspec.msgpack.Decoder(ToDevice).decode
