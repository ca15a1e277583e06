"""The store's arm beside an engine's device memory: registers the KV tensors, and copies what the store asks for.

engine thread --release/take_ended--> DeviceTasks <--ops-- socket thread <--ipc--> the store's DeviceEndpoint
                                          |                     ^
                                          `--> copy thread --results
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq

from flexkv.common.config import ModelConfig
from flexkv.common.storage import DeviceLayout, PoolLayout, device_layout
from flexkv.errors import FlexKVError, TransferError
from flexkv.server import request as msg
from flexkv.server.runtime_dir import device_socket, pool_socket
from flexkv.storage.allocator import CpuPool
from flexkv.transfer.device_copier import make_copier
from flexkv.transfer.device_tasks import CopyJob, DeviceTasks
from flexkv.transfer.device_worker import CopyStats, DeviceWorker
from flexkv.transfer.worker import OpResult

logger = logging.getLogger(__name__)

_POOL_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 10.0
_SEND_HWM = 1000
"""Messages that wait for a store that does not read; results beyond it stay with us, anything else is not sent."""


class KVTPClient:
    """One tensor-parallel rank's device worker. Works also while the store is not there: then everything is a miss.

    With `gated`, ops of a task wait until `release` names it, and `take_ended` tells how it ended. `release`,
    `take_ended` and `close` are for one thread, the engine's. A closed client is not used again.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        model: ModelConfig,
        tokens_per_block: int,
        *,
        gated: bool = False,
        num_copy_threads: int = 2,
    ) -> None:
        """Make a client of the store in `directory` (see `server.runtime_dir`); nothing runs before `register`."""
        self._directory = directory
        self._rank = rank
        self._model = model
        self._tokens_per_block = tokens_per_block
        self._num_copy_threads = num_copy_threads
        self._thread = threading.Thread(target=self._run, name=f"flexkv-client-{rank}", daemon=True)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tasks = DeviceTasks(self._post_result, gated=gated)
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._results: deque[OpResult] = deque()  # protected by _lock; one per op a store has handed out
        self._closing = False  # protected by _lock
        self._started = False
        # Constant after `register`:
        self._kv_caches: Mapping[str, Any] = {}
        self._layout: DeviceLayout
        # Owned by the socket thread once started; `_worker` is set once and then only read by others:
        self._worker: DeviceWorker | None = None
        self._pool: CpuPool | None = None
        self._is_blocked = False  # the socket took no message: no store is connected, or it does not read
        self._socket: zmq.Socket[bytes]
        self._refusal = ""
        self._heard = 0.0
        self._next_beat = 0.0

    # -- the engine's thread ---------------------------------------------------------------------------------------
    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Take the engine's KV tensors (layer name -> tensor, in layer order) and begin to look for the store.

        Raises:
            ConfigError: their layout is not one we know, or not the model's.
        """
        assert not self._started, "registered twice"
        self._layout = device_layout(kv_caches, self._model, self._tokens_per_block)
        self._kv_caches = dict(kv_caches)
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, b"w" + secrets.token_bytes(8))
        self._socket.set(zmq.LINGER, 500)
        self._socket.set(zmq.RECONNECT_IVL, 20)  # ms; the store is usually about to come
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.set(zmq.IMMEDIATE, 1)  # no queue without a store: a message it never gets would be out of date
        self._socket.set(zmq.SNDHWM, _SEND_HWM)
        self._socket.set(zmq.RCVHWM, 0)  # the store has so many tasks alive, and answers what we sent
        self._socket.connect(device_socket(self._directory))  # the store may bind later
        self._started = True
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the store has accepted this rank and was heard of lately."""
        return self._ready.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for the store; False if it is not there in time."""
        return self._ready.wait(timeout_s)

    def release(self, task_ids: Iterable[int], timeout_s: float) -> None:
        """Let the copies of these tasks run; one that cannot begin within `timeout_s` fails its task.

        Without a store they fail at once.
        """
        tasks = list(task_ids)
        if self._worker is not None:
            self._worker.wait_for_engine()
        self._tasks.release(tasks, timeout_s)
        if not self._ready.is_set():  # asked after `release`: a store lost from now on fails them itself
            self._tasks.abandon(tasks, "there is no store")

    def take_ended(self) -> dict[int, str]:
        """Return the released tasks that ended since the last call, each with its error, empty if it succeeded.

        The engine owns the blocks of these tasks again: nothing will touch them.
        """
        return self._tasks.take_ended()

    @property
    def stats(self) -> CopyStats:
        """What was copied so far."""
        return self._worker.stats if self._worker is not None else CopyStats()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on this rank."""
        return self._layout.block_bytes

    def close(self) -> None:
        """Let the running copy end, fail the rest, and leave the store. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._tasks.close()
        if self._started:
            os.eventfd_write(self._wake, 1)
            self._thread.join(2 * _CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                logger.error("device client did not end rank=%d", self._rank)
                return
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- any thread ------------------------------------------------------------------------------------------------
    def _post_result(self, result: OpResult) -> None:
        with self._lock:
            self._results.append(result)
            if not self._closing:
                os.eventfd_write(self._wake, 1)

    # -- the socket thread -----------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._is_closing():
                self._step()
        except Exception:  # the thread's boundary: without it nothing loads, and the engine computes
            logger.exception("the device client failed rank=%d; every load is a miss from now on", self._rank)
        self._ready.clear()
        self._tasks.close()
        try:
            if self._worker is not None:
                self._worker.join(_CLOSE_TIMEOUT_S)
            if self._pool is not None:
                self._pool.close()
            self._send_results()
            self._send(msg.Bye())  # a promise that nothing is copied any more
        except (TransferError, zmq.ZMQError) as error:
            logger.error("the device client leaves without a word rank=%d error=%s", self._rank, error)
        finally:
            self._socket.close()

    def _is_closing(self) -> bool:
        with self._lock:
            return self._closing

    def _step(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + msg.HEARTBEAT_S
            self._beat(now)
        poller = zmq.Poller()  # after the beat, which may have found the socket full
        poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._is_blocked else 0))
        poller.register(self._wake, zmq.POLLIN)
        events = dict(poller.poll(max(0, int((self._next_beat - now) * 1000))))
        if self._wake in events:
            os.eventfd_read(self._wake)
        if events.get(self._socket, 0) & zmq.POLLIN:
            self._receive()
        if events.get(self._socket, 0) & zmq.POLLOUT:
            self._is_blocked = False
            if not self._ready.is_set():
                self._next_beat = 0.0  # a store has come: register at once, after the results of what went before
        self._send_results()

    def _beat(self, now: float) -> None:
        """Once per heartbeat: stay in touch with the store, or look for one."""
        self._tasks.expire()
        if self._ready.is_set() and now - self._heard > msg.SILENCE_S:
            logger.warning("the store is silent rank=%d: registering again", self._rank)
            self._lose_store("the store is silent")
        if self._ready.is_set():
            self._send(msg.Ping())
            return
        layout = self._layout
        self._send(msg.Register(msg.PROTOCOL_VERSION, self._rank, os.getpid(), layout.fingerprint, layout.block_bytes))

    def _lose_store(self, reason: str) -> None:
        self._ready.clear()
        self._tasks.start_over(reason)

    def _send(self, message: msg.FromDevice) -> bool:
        """Send to the store; False if none is connected, or it does not read."""
        try:
            self._socket.send(msg.encode(message), flags=zmq.DONTWAIT)
        except zmq.Again:
            self._is_blocked = True
            logger.debug("message not sent rank=%d type=%s", self._rank, type(message).__name__)
            return False
        return True

    def _send_results(self) -> None:
        with self._lock:
            results, self._results = self._results, deque()
        while results:
            result = results[0]
            if not self._send(msg.OpDone(result.op_id, result.ok, result.error, result.is_data_bad)):
                break
            results.popleft()
        if results:  # a store that is merely slow waits for them; another does not know their ops
            with self._lock:
                self._results.extendleft(reversed(results))

    def _receive(self) -> None:
        while True:
            try:
                frame = self._socket.recv(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            self._heard = time.monotonic()
            self._handle(msg.decode_to_device(frame))

    def _handle(self, message: msg.ToDevice) -> None:
        match message:
            case msg.CopyOp():
                self._tasks.add(_copy_job(message))
            case msg.CancelOps():
                self._tasks.cancel(set(message.op_ids))
            case msg.AbandonTasks():
                self._tasks.abandon(message.task_ids, "what had to precede it failed")
            case msg.Registered():
                if not self._ready.is_set():
                    self._attach(message)
            case msg.Refused():
                self._note_refusal(message.reason)
            case msg.Closing():
                self._lose_store("the store has closed")
            case msg.Pong():
                pass

    def _attach(self, message: msg.Registered) -> None:
        """Map the store's pool and say that ops may come."""
        layout = PoolLayout(message.num_blocks, message.block_bytes, message.rank_offset, message.padding)
        try:
            pool = self._receive_pool(layout)
            copier = make_copier(self._kv_caches, self._layout, pool, layout.rank_offset, self._num_copy_threads)
        except (FlexKVError, ValueError) as error:
            self._note_refusal(str(error))
            return
        if self._worker is None:
            self._worker = DeviceWorker(self._tasks, copier, self._layout.num_layers)
            self._worker.start()
        else:
            self._worker.use(copier)
        self._pool = pool
        self._refusal = ""
        self._tasks.start_over("another store took over")
        self._ready.set()  # before the store hears of it, and hands out tasks
        self._send(msg.Ready())
        logger.info("device worker ready rank=%d pool_blocks=%d", self._rank, layout.num_blocks)

    def _receive_pool(self, layout: PoolLayout) -> CpuPool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_POOL_TIMEOUT_S)
            try:
                connection.connect(pool_socket(self._directory))
            except OSError as error:
                raise TransferError(f"the store's pool socket does not answer: {error}") from error
            return CpuPool.receive(layout, connection)

    def _note_refusal(self, reason: str) -> None:
        if reason != self._refusal:  # it is asked again every second; say it once
            logger.error("the store does not take rank=%d: %s", self._rank, reason)
        self._refusal = reason


def _copy_job(message: msg.CopyOp) -> CopyJob:
    return CopyJob(
        op_id=message.op_id,
        task_id=message.task_id,
        num_task_ops=message.num_task_ops,
        to_device=message.to_device,
        device_blocks=np.frombuffer(message.device_blocks, np.int64).copy(),  # writable, which torch insists on
        pool_blocks=np.frombuffer(message.pool_blocks, np.int64).copy(),
        first_layer=message.first_layer,
        num_layers=message.num_layers,
        deadline=time.monotonic() + message.timeout_s,
    )
