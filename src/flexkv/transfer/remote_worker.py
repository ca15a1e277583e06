"""Moves blocks between the CPU pool and the remote store, one call of the store per op, several at once.

    lane   threads                        what goes wrong
    load   flexkv-remote-get-0, 1, ...    a miss, however it came about, is a failed block
    store  flexkv-remote-put-0, 1, ...    counted; the other tiers have the block

An op has one deadline for waiting and running together: a slow or dead store delays nobody beyond it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

import numpy as np

from flexkv.common.config import RemoteTierConfig
from flexkv.common.transfer import BlockContent, TransferType
from flexkv.errors import TransferError
from flexkv.storage.allocator import CpuPool
from flexkv.storage.remote.base import BoolArray, RemoteStore
from flexkv.transfer.lane import Lane, LaneConfig, QueuedOp
from flexkv.transfer.worker import OpResult, PathStats, ReportResult, ScheduledOp, TransferWorker, problem_of

KeysOf = Callable[[BlockContent], list[str]]
"""Names blocks in the store; raises TransferError while that is not possible."""

_CLOSE_MARGIN_S: Final = 10.0
"""Beyond the deadline: the grace of any backend."""


class RemoteWorker(TransferWorker):
    """Runs REMOTE2H and H2REMOTE ops, whose remote side is their `content`. Any thread may ask for statistics."""

    def __init__(self, store: RemoteStore, keys_of: KeysOf, pool: CpuPool, config: RemoteTierConfig) -> None:
        """Take what to ask.

        Args:
            store: never raises what a store can raise: a `ResilientStore`. Closed by its owner, after this worker.
            keys_of: `StorageEngine.remote_keys`.
            pool: the CPU tier.
            config: deadlines and threads.
        """
        self._store = store
        self._keys_of = keys_of
        self._pool = pool
        self._get_deadline_s = config.get_deadline_s
        get = self._lane_config("get", config.num_get_threads, config.get_deadline_s)
        self._lanes = {TransferType.REMOTE2H: Lane(get, self._get)}
        if config.write == "all":
            put = self._lane_config("put", config.num_put_threads, config.put_deadline_s)
            self._lanes[TransferType.H2REMOTE] = Lane(put, self._put)

    def _lane_config(self, name: str, num_threads: int, deadline_s: float) -> LaneConfig:
        return LaneConfig(
            name=f"flexkv-remote-{name}",
            num_threads=num_threads,
            max_batch_ops=1,
            max_batch_blocks=1,
            block_bytes=self._pool.layout.block_bytes,
            deadline_s=deadline_s,
            close_timeout_s=deadline_s + _CLOSE_MARGIN_S,
        )

    # -- any thread ------------------------------------------------------------------------------------------------
    def start(self, report: ReportResult) -> None:
        """Begin to take ops; their results go to `report`."""
        self._report = report
        for lane in self._lanes.values():
            lane.start(report)

    def submit(self, scheduled: ScheduledOp) -> None:
        """Take an op; it fails at once if it makes no sense, or stores what is only to be read."""
        op = scheduled.op
        lane = self._lanes.get(op.type)
        if lane is None:
            self._report(OpResult(op.op_id, False, f"the remote tier takes no {op.type.value}"))
            return
        pool_blocks = op.dst_block_ids if op.type is TransferType.REMOTE2H else op.src_block_ids
        if problem := problem_of(op, None, (("pool block", pool_blocks, self._pool.layout.num_blocks),)):
            lane.refuse(op.op_id, problem)
        else:
            lane.submit(scheduled)

    def find(self, content: BlockContent) -> Future[int]:
        """Ask how many of these blocks, from the first on without a gap, the store has: 0 when it cannot say in time.

        The future ends with TransferError when the worker is closed, or blocks cannot be named yet.
        """
        found = [0]

        def ask() -> None:
            deadline = time.monotonic() + self._get_deadline_s
            is_there = self._store.exists(self._keys_of(content), deadline)
            found[0] = len(is_there) if is_there.all() else int(is_there.argmin())

        answer: Future[int] = Future()

        def pass_on(asked: Future[None]) -> None:
            error = asked.exception()
            if error is None:
                answer.set_result(found[0])
            else:
                answer.set_exception(error)

        self._lanes[TransferType.REMOTE2H].call(ask).add_done_callback(pass_on)
        return answer

    def cancel(self, op_id: int) -> None:
        """Give up an op that has not begun."""
        for lane in self._lanes.values():
            lane.cancel(op_id)

    def stats(self) -> dict[TransferType, PathStats]:
        """Return the counters of each direction; the store has its own, of hits, retries and the breaker."""
        return {kind: lane.stats() for kind, lane in self._lanes.items()}

    def close(self) -> None:
        """End running calls, by their deadlines, and fail the rest. Idempotent."""
        for lane in self._lanes.values():
            lane.close()

    # -- the threads -----------------------------------------------------------------------------------------------
    def _get(self, batch: Sequence[QueuedOp]) -> list[OpResult]:
        def call(keys: list[str], buffers: list[memoryview], deadline: float) -> BoolArray:
            return self._store.get(keys, buffers, deadline)

        return [self._ask(queued, queued.scheduled.op.dst_block_ids.tolist(), call) for queued in batch]

    def _put(self, batch: Sequence[QueuedOp]) -> list[OpResult]:
        def call(keys: list[str], buffers: list[memoryview], deadline: float) -> BoolArray:
            return self._store.put(keys, buffers, deadline)

        return [self._ask(queued, queued.scheduled.op.src_block_ids.tolist(), call) for queued in batch]

    def _ask(
        self, queued: QueuedOp, pool_blocks: list[int], call: Callable[[list[str], list[memoryview], float], BoolArray]
    ) -> OpResult:
        content = queued.scheduled.op.content
        assert content is not None  # checked by submit
        try:
            keys = self._keys_of(content)
        except TransferError as error:
            return OpResult(queued.op_id, False, str(error))
        blocks = self._pool.blocks()
        done = call(keys, [blocks[i].data for i in pool_blocks], queued.deadline)
        failed = tuple(np.flatnonzero(~done).tolist())
        if not failed:
            return OpResult(queued.op_id, True)
        verb = "loaded" if queued.scheduled.op.type is TransferType.REMOTE2H else "stored"
        return OpResult(queued.op_id, True, f"{len(failed)} of {len(done)} blocks were not {verb}", failed=failed)
