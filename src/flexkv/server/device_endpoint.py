"""The store's side of its device workers: one thread, one ROUTER socket, one op fanned out to every rank.

    transfer thread --outbox--> endpoint thread <--ROUTER--> KVTPClient of rank 0, 1, ...

An op ends when every rank has answered. A rank that vanishes answers by the end of its process (pidfd) or its Bye; one
that is merely silent does not, because it may still be copying.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from flexkv.common.config import ModelConfig
from flexkv.common.transfer import TransferType
from flexkv.errors import FlexKVError, ServerError
from flexkv.server import request as msg
from flexkv.server.runtime_dir import device_socket, pool_socket
from flexkv.storage.allocator import CpuPool
from flexkv.transfer.worker import OpResult, ReportResult, ScheduledOp, TransferWorker

logger = logging.getLogger(__name__)

_RECEIVE_HWM = 1000
"""Messages of one rank that wait for us; beyond it they wait on the rank's side."""
_CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Rank:
    identity: bytes
    pid: int
    pidfd: int | None
    fingerprint: str
    heard: float
    is_ready: bool = False


@dataclass(slots=True)
class _PendingOp:
    waiting_for: set[int]
    errors: list[str] = field(default_factory=list)
    is_data_bad: bool = False


_Command = ScheduledOp | msg.CancelOps | msg.AbandonTasks | msg.Closing


class DeviceEndpoint(TransferWorker):
    """Runs H2D and D2H ops on the device workers of all ranks. Any thread may ask whether it is ready."""

    def __init__(
        self,
        model: ModelConfig,
        tokens_per_block: int,
        pool: CpuPool,
        directory: Path,
        bind_layout: Callable[[str], None] = lambda layout: None,
    ) -> None:
        """Serve the sockets of a private directory.

        Args:
            model: the shape of a block.
            tokens_per_block: of the engine.
            pool: the CPU tier.
            directory: where device workers find it.
            bind_layout: told the layout of a rank that registers; when it raises a FlexKVError the rank is refused.

        Raises:
            ServerError: the sockets cannot be bound.
        """
        self._bind_layout = bind_layout
        self._tp_size = model.tp_size
        self._rank_bytes = model.rank_block_bytes(tokens_per_block)
        self._pool = pool
        self._directory = directory
        self._thread = threading.Thread(target=self._run, name="flexkv-device-endpoint", daemon=True)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._outbox: deque[_Command] = deque()  # protected by _lock; bounded by the tasks alive
        self._accepting = True  # protected by _lock
        self._is_closed = False  # protected by _lock
        self._started = False
        self._all_ready = threading.Event()
        self.fingerprint = ""
        """Layout of the ranks' tensors, empty until one has registered."""
        # Owned by the endpoint thread once started:
        self._report: ReportResult
        self._ranks: dict[int, _Rank] = {}
        self._pending: dict[int, _PendingOp] = {}
        self._stopping = False
        self._bind()

    def _bind(self) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 500)
        # A rank gets the ops of the tasks alive, and none when it is silent: what waits for one that hangs is bounded.
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, _RECEIVE_HWM)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._pool_listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(device_socket(self._directory))
            self._pool_listener.bind(pool_socket(self._directory))
            self._pool_listener.listen(16)
            self._pool_listener.setblocking(False)
        except (zmq.ZMQError, OSError) as error:
            self._close_sockets()
            raise ServerError(f"cannot serve device workers in {self._directory}: {error}") from error

    @property
    def is_ready(self) -> bool:
        """Whether every rank is there and was heard of lately."""
        return self._all_ready.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until every rank is there; False if they are not in time."""
        return self._all_ready.wait(timeout_s)

    # -- the transfer thread ---------------------------------------------------------------------------------------
    def start(self, report: ReportResult) -> None:
        """Begin to serve; results go to `report`."""
        self._report = report
        self._started = True
        self._thread.start()

    def submit(self, scheduled: ScheduledOp) -> None:
        """Send an op to every rank; it fails at once while a rank is missing."""
        if not self._send(scheduled):
            self._report(OpResult(scheduled.op.op_id, False, "the device endpoint is closed"))

    def cancel(self, op_id: int) -> None:
        """Ask every rank to drop the op if it has not begun."""
        self._send(msg.CancelOps([op_id]))

    def abandon(self, task_id: int) -> None:
        """Tell every rank that the task's op will not come."""
        self._send(msg.AbandonTasks([task_id]))

    def close(self) -> None:
        """Tell the ranks, report what they had not finished as failed, and remove the sockets. Idempotent.

        A thread that does not end in time is logged and keeps the sockets, which are its own.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._accepting = False
            self._outbox.append(msg.Closing())
            os.eventfd_write(self._wake, 1)
        if self._started:
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                logger.error("the device endpoint did not end within %g s", _CLOSE_TIMEOUT_S)
                return
        else:
            self._close_sockets()
        os.close(self._wake)

    def _send(self, command: _Command) -> bool:
        with self._lock:
            if not self._accepting:
                return False
            self._outbox.append(command)
            os.eventfd_write(self._wake, 1)
        return True

    # -- the endpoint thread ---------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
        except Exception:  # the thread's boundary: the store goes on without device workers, that is, with misses
            logger.exception("the device endpoint failed; loads and stores fail from now on")
            with self._lock:
                self._accepting = False
                left = [c for c in self._outbox if isinstance(c, ScheduledOp)]
            for scheduled in left:
                self._report(OpResult(scheduled.op.op_id, False, "the device endpoint failed"))
        self._all_ready.clear()
        for op_id in list(self._pending):
            self._report(OpResult(op_id, False, "the device endpoint closed"))
        self._pending.clear()
        for rank in self._ranks.values():
            _close_fd(rank.pidfd)
        self._close_sockets()

    def _step(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        for fd in (self._wake, self._pool_listener.fileno()):
            poller.register(fd, zmq.POLLIN)
        by_pidfd = {rank.pidfd: number for number, rank in self._ranks.items() if rank.pidfd is not None}
        for pidfd in by_pidfd:
            poller.register(pidfd, zmq.POLLIN)
        events = dict(poller.poll(int(msg.HEARTBEAT_S * 1000)))
        if self._wake in events:
            os.eventfd_read(self._wake)
            self._run_commands()
        if self._pool_listener.fileno() in events:
            self._hand_out_pool()
        if self._socket in events:
            self._receive()
        for pidfd, number in by_pidfd.items():
            if pidfd in events and number in self._ranks and self._ranks[number].pidfd == pidfd:
                logger.warning("device worker died rank=%d pid=%d", number, self._ranks[number].pid)
                self._lose(number, "the device worker died")
        self._update_ready()

    def _run_commands(self) -> None:
        with self._lock:
            commands, self._outbox = self._outbox, deque()
        for command in commands:
            match command:
                case ScheduledOp():
                    self._fan_out(command)
                case msg.Closing():
                    self._broadcast(command)
                    self._stopping = True
                case _:
                    self._broadcast(command)

    def _fan_out(self, scheduled: ScheduledOp) -> None:
        op = scheduled.op
        missing = [n for n in range(self._tp_size) if n not in self._ranks or not self._ranks[n].is_ready]
        if missing:
            self._broadcast(msg.AbandonTasks([scheduled.task_id]))  # those that are there need not wait for it
            self._report(OpResult(op.op_id, False, f"no device worker of rank {missing[0]}"))
            return
        to_device = op.type is TransferType.H2D
        device_blocks, pool_blocks = op.src_block_ids, op.dst_block_ids
        if to_device:
            device_blocks, pool_blocks = pool_blocks, device_blocks
        message = msg.CopyOp(
            op_id=op.op_id,
            task_id=scheduled.task_id,
            num_task_ops=scheduled.num_task_ops,
            to_device=to_device,
            device_blocks=device_blocks.tobytes(),
            pool_blocks=pool_blocks.tobytes(),
            first_layer=op.layer_id,
            num_layers=op.num_layers,
            timeout_s=scheduled.timeout_s,
        )
        self._pending[op.op_id] = _PendingOp(set(range(self._tp_size)))
        for number in range(self._tp_size):
            if not self._send_to(self._ranks[number].identity, message):
                self._op_ended(op.op_id, number, "the device worker is gone")

    def _broadcast(self, message: msg.ToDevice) -> None:
        for rank in self._ranks.values():
            self._send_to(rank.identity, message)

    def _send_to(self, identity: bytes, message: msg.ToDevice) -> bool:
        try:
            self._socket.send_multipart([identity, msg.encode(message)], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            logger.debug("message not sent error=%s", error)
            return False
        return True

    def _receive(self) -> None:
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                message = msg.decode_from_device(b"".join(frames))
            except (ValueError, TypeError) as error:  # msgspec's errors are ValueErrors
                logger.warning("malformed message from a device worker dropped error=%s", error)
                continue
            self._handle(identity, message)

    def _handle(self, identity: bytes, message: msg.FromDevice) -> None:
        if isinstance(message, msg.Register):
            reply = self._register(identity, message)
            self._send_to(identity, reply)
            return
        found = [(number, rank) for number, rank in self._ranks.items() if rank.identity == identity]
        if not found:
            return  # it was lost, and has to register again
        number, rank = found[0]
        rank.heard = time.monotonic()
        match message:
            case msg.Ready():
                rank.is_ready = True
            case msg.OpDone():
                error = "" if message.ok else message.error or "copy failed"
                self._op_ended(message.op_id, number, error, message.is_data_bad)
            case msg.Ping():
                self._send_to(identity, msg.Pong())
            case msg.Bye():
                self._lose(number, "the device worker left")

    def _register(self, identity: bytes, message: msg.Register) -> msg.Registered | msg.Refused:
        if reason := self._refusal(identity, message):
            logger.warning("device worker refused rank=%d reason=%s", message.rank, reason)
            return msg.Refused(reason)
        known = self._ranks.get(message.rank)
        if known is None or known.identity != identity:
            pidfd = None if message.pid == os.getpid() else _open_pidfd(message.pid)
            self._ranks[message.rank] = _Rank(identity, message.pid, pidfd, message.fingerprint, time.monotonic())
            self.fingerprint = message.fingerprint
            logger.info("device worker registered rank=%d pid=%d", message.rank, message.pid)
        layout = self._pool.layout
        return msg.Registered(layout.num_blocks, layout.block_bytes, message.rank * self._rank_bytes, layout.padding)

    def _refusal(self, identity: bytes, message: msg.Register) -> str:
        if message.protocol_version != msg.PROTOCOL_VERSION:
            return f"it speaks protocol {message.protocol_version}, the store {msg.PROTOCOL_VERSION}"
        if not 0 <= message.rank < self._tp_size:
            return f"rank {message.rank} is not within the {self._tp_size} of the store"
        if message.block_bytes != self._rank_bytes:
            return f"its blocks have {message.block_bytes} bytes, the store's have {self._rank_bytes} per rank"
        if self.fingerprint and message.fingerprint != self.fingerprint:
            return f"its layout is {message.fingerprint!r}, the store's is {self.fingerprint!r}"
        try:
            self._bind_layout(message.fingerprint)
        except FlexKVError as error:
            return str(error)
        rank = self._ranks.get(message.rank)
        if rank is not None and rank.identity != identity:
            return f"rank {message.rank} is taken by process {rank.pid}"
        return ""

    def _op_ended(self, op_id: int, number: int, error: str, is_data_bad: bool = False) -> None:
        pending = self._pending.get(op_id)
        if pending is None or number not in pending.waiting_for:
            return
        pending.waiting_for.discard(number)
        pending.is_data_bad |= is_data_bad
        if error:
            pending.errors.append(f"rank {number}: {error}")
        if not pending.waiting_for:
            del self._pending[op_id]
            self._report(OpResult(op_id, not pending.errors, "; ".join(pending.errors), pending.is_data_bad))

    def _lose(self, number: int, reason: str) -> None:
        rank = self._ranks.pop(number)
        _close_fd(rank.pidfd)
        for op_id in list(self._pending):
            self._op_ended(op_id, number, reason)

    def _update_ready(self) -> None:
        now = time.monotonic()
        heard = [rank for rank in self._ranks.values() if rank.is_ready and now - rank.heard < msg.SILENCE_S]
        if len(heard) == self._tp_size:
            self._all_ready.set()
        else:
            self._all_ready.clear()

    def _hand_out_pool(self) -> None:
        try:
            connection, _ = self._pool_listener.accept()
        except OSError:
            return  # it went away again
        with connection:
            try:
                connection.settimeout(1.0)
                self._pool.send(connection)
            except OSError as error:
                logger.warning("memory pool not handed out error=%s", error)

    def _close_sockets(self) -> None:
        self._socket.close()
        self._pool_listener.close()


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        logger.warning("cannot watch device worker pid=%d error=%s", pid, error)
        return None


def _close_fd(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
