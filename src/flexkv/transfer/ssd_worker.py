"""Moves blocks between the CPU pool and the SSD tier: one thread reads, one writes, each all it finds in one batch.

    lane   thread             order of a batch
    load   flexkv-ssd-read    known slots -> read -> checksum; damaged ones are left to the other thread to forget
    store  flexkv-ssd-write   delete old rows, commit -> write -> (sync) -> insert rows, commit

The writing thread owns the index. What it was told to forget is gone before any op that was submitted later begins.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

import numpy as np
import numpy.typing as npt

from flexkv import _native
from flexkv.common.config import Durability, SsdTierConfig
from flexkv.common.transfer import BlockContent, BlockIds, TransferType
from flexkv.errors import CacheStateError, ConfigError, TransferError
from flexkv.storage.allocator import CpuPool
from flexkv.storage.ssd_rows import HASH_BYTES, StoredBlocks
from flexkv.storage.ssd_tier import SsdTier
from flexkv.transfer.lane import Lane, LaneConfig, QueuedOp
from flexkv.transfer.worker import OpResult, PathStats, ReportResult, ScheduledOp, TransferWorker, problem_of

logger = logging.getLogger(__name__)

Statuses = npt.NDArray[np.int32]

_BATCH_BYTES: Final = 256 * 2**20
"""Enough to keep any disk busy, and no more than a second or so of it: what comes next waits that long."""
_MAX_BATCH_OPS: Final = 256
_DRAIN_S: Final = 10.0
_CLOSE_MARGIN_S: Final = 5.0
# Too late is not damaged: the block may be there the next time.
_NOT_BAD: Final = (0, errno.ETIMEDOUT, errno.EINPROGRESS)
_lost_pools: Final[list[npt.NDArray[np.uint8]]] = []
"""Pools that a request may still write into: never unmapped, whoever closes them."""


class _Disk:
    """One native transfer, for one thread. Once a request is lost it does nothing more."""

    def __init__(self, tier: SsdTier, pool: CpuPool) -> None:
        self._pool = pool
        self._is_broken = False
        side = _native.PoolSide(
            base=pool.address, num_blocks=pool.layout.num_blocks, block_stride=pool.layout.block_stride, offset=0
        )
        try:
            self.transfer = _native.SsdTransfer(
                paths=[str(path) for path in tier.store.files.paths],
                block_bytes=tier.store.block_bytes,
                num_slots=tier.num_slots,
                pool=side,
                options=_native_options(tier.config),
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"the SSD tier cannot be used: {error}") from error

    def read(
        self, slots: BlockIds, pool_blocks: BlockIds, checksums: npt.NDArray[np.uint64], timeout_s: float
    ) -> Statuses:
        """Fill pool blocks; return an errno each."""
        return self._run(len(slots), lambda: self.transfer.read(slots, pool_blocks, checksums, timeout_s))

    def write(
        self, slots: BlockIds, pool_blocks: BlockIds, timeout_s: float
    ) -> tuple[Statuses, npt.NDArray[np.uint64]]:
        """Fill slots; return an errno and a checksum each."""
        checksums = np.zeros(len(slots), np.uint64)

        def move() -> Statuses:
            nonlocal checksums
            statuses, checksums = self.transfer.write(slots, pool_blocks, timeout_s)
            return statuses

        return self._run(len(slots), move), checksums

    def release(self) -> None:
        """Give files and pinned memory back. REQUIRES: the thread has ended; idempotent."""
        self._is_broken = True
        self.__dict__.pop("transfer", None)

    def _run(self, num_blocks: int, move: Callable[[], Statuses]) -> Statuses:
        if self._is_broken:
            raise TransferError("a request to this SSD never came back; the tier is out of service until a restart")
        if num_blocks == 0:
            return np.empty(0, np.int32)
        try:
            statuses = move()
        except TransferError:  # requests may be under way, of any of these blocks
            logger.exception("SSD transfer failed: the tier is out of service")
            statuses = np.full(num_blocks, errno.EINPROGRESS, np.int32)
        num_lost = int(np.count_nonzero(statuses == errno.EINPROGRESS))
        if num_lost:
            logger.error("SSD requests never came back: out of service num_blocks=%d", num_lost)
            self._is_broken = True
            _lost_pools.append(self._pool.blocks())
        return statuses


class SsdWorker(TransferWorker):
    """Runs DISK2H and H2DISK ops, whose SSD side are slots. Every op carries its `content`.

    Statistics and `forget` may be called by any thread.
    """

    def __init__(self, tier: SsdTier, pool: CpuPool, op_timeout_s: float) -> None:
        """Open the files.

        Args:
            tier: the storage; its index belongs to this worker from `start` to `close`.
            pool: the CPU tier.
            op_timeout_s: what is not over so long after it has begun is given up, in seconds.

        Raises:
            ConfigError: the disk, or the backend asked for, cannot be used.
        """
        self._tier = tier
        self._pool = pool
        self._op_timeout_s = op_timeout_s
        self._reader, self._writer = _Disk(tier, pool), _Disk(tier, pool)
        for reason in self._reader.transfer.fallbacks:
            logger.warning("SSD tier works with less than was asked for: %s", reason)
        self._lanes = {
            TransferType.DISK2H: Lane(self._lane_config("read"), lambda batch: _each_fair(self._read, batch)),
            TransferType.H2DISK: Lane(self._lane_config("write"), lambda batch: _each_fair(self._write, batch)),
        }

    def _lane_config(self, name: str) -> LaneConfig:
        block_bytes = self._tier.store.block_bytes
        return LaneConfig(
            name=f"flexkv-ssd-{name}",
            num_threads=1,
            max_batch_ops=_MAX_BATCH_OPS,
            max_batch_blocks=max(1, _BATCH_BYTES // block_bytes),
            block_bytes=block_bytes,
            deadline_s=None,
            close_timeout_s=self._op_timeout_s + _DRAIN_S + _CLOSE_MARGIN_S,
        )

    # -- any thread ------------------------------------------------------------------------------------------------
    def start(self, report: ReportResult) -> None:
        """Begin to take ops; their results go to `report`."""
        for lane in self._lanes.values():
            lane.start(report)

    def submit(self, scheduled: ScheduledOp) -> None:
        """Take an op; it fails at once if it makes no sense."""
        op = scheduled.op
        lane = self._lanes[op.type]
        is_load = op.type is TransferType.DISK2H
        slots, blocks = (op.src_block_ids, op.dst_block_ids) if is_load else (op.dst_block_ids, op.src_block_ids)
        sides = (("slot", slots, self._tier.num_slots), ("pool block", blocks, self._pool.layout.num_blocks))
        if problem := problem_of(op, HASH_BYTES, sides):
            lane.refuse(op.op_id, problem)
        else:
            lane.submit(scheduled)

    def cancel(self, op_id: int) -> None:
        """Give up an op that has not begun."""
        for lane in self._lanes.values():
            lane.cancel(op_id)

    def forget(self, slots: BlockIds | None) -> Future[None]:
        """Delete the rows of slots, None for all, so that a restart does not find them; ops submitted later come after.

        REQUIRES: no op of these slots is running. The future ends once that is committed, or with TransferError.
        """
        return self._lanes[TransferType.H2DISK].call(lambda: self._tier.forget(slots))

    def stats(self) -> dict[TransferType, PathStats]:
        """Return the counters of both directions."""
        return {kind: lane.stats() for kind, lane in self._lanes.items()}

    def close(self) -> None:
        """End running batches, fail the rest. Idempotent; takes up to the op timeout when the disk hangs."""
        for lane, disk in zip(self._lanes.values(), (self._reader, self._writer), strict=True):
            if lane.close():
                disk.release()
            else:
                _lost_pools.append(self._pool.blocks())

    # -- the reading thread ----------------------------------------------------------------------------------------
    def _read(self, batch: Sequence[QueuedOp]) -> list[OpResult]:
        ops = [queued.scheduled.op for queued in batch]
        slots = np.concatenate([op.src_block_ids for op in ops])
        pool_blocks = np.concatenate([op.dst_block_ids for op in ops])
        hashes = np.concatenate([_content(queued).hashes for queued in batch])
        is_known, checksums = self._tier.slots.look_up(slots, hashes)
        statuses = np.full(len(slots), errno.ENOENT, np.int32)
        statuses[is_known] = self._reader.read(
            slots[is_known], pool_blocks[is_known], checksums[is_known], self._op_timeout_s
        )
        damaged = slots[is_known & ~np.isin(statuses, _NOT_BAD)]
        if len(damaged):
            logger.warning("SSD blocks are damaged, forgotten num_blocks=%d first_slot=%d", len(damaged), damaged[0])
            self.forget(damaged)  # before the results: later ops may use these slots again
        return _results(batch, statuses)

    # -- the writing thread ----------------------------------------------------------------------------------------
    def _write(self, batch: Sequence[QueuedOp]) -> list[OpResult]:
        contents = [_content(queued) for queued in batch]
        ops = [queued.scheduled.op for queued in batch]
        slots = np.concatenate([op.dst_block_ids for op in ops])
        pool_blocks = np.concatenate([op.src_block_ids for op in ops])
        try:
            self._tier.forget(slots)
            namespace_ids = [self._tier.store.index.namespace_id(content.namespace) for content in contents]
        except TransferError as error:
            return _all_failed(batch, str(error))
        statuses, checksums = self._writer.write(slots, pool_blocks, self._op_timeout_s)
        blocks = StoredBlocks(
            slots,
            np.concatenate([content.hashes for content in contents]),
            np.concatenate([content.parents for content in contents]),
            checksums,
            np.repeat(np.array(namespace_ids, np.int64), [len(content) for content in contents]),
        )
        try:
            self._insert(blocks.take(statuses == 0))
        except (OSError, TransferError, CacheStateError) as error:
            logger.warning("SSD blocks written but not stored num_blocks=%d error=%s", len(blocks), error)
            statuses[statuses == 0] = errno.EIO
        return _results(batch, statuses)

    def _insert(self, blocks: StoredBlocks) -> None:
        if len(blocks) == 0:
            return
        if self._tier.store.durability is Durability.POWER:
            self._writer.transfer.sync()
        self._tier.insert(blocks)


def _content(queued: QueuedOp) -> BlockContent:
    content = queued.scheduled.op.content
    assert content is not None  # checked by submit
    return content


def _each_fair(carry_out: Callable[[Sequence[QueuedOp]], list[OpResult]], batch: Sequence[QueuedOp]) -> list[OpResult]:
    """Carry out a batch; if one op is at odds with itself or another, one by one, so that only that one fails."""
    try:
        return carry_out(batch)
    except TransferError as error:
        return _all_failed(batch, str(error))
    except (IndexError, ValueError) as error:
        if len(batch) == 1:
            return _all_failed(batch, str(error))
        return [result for queued in batch for result in _each_fair(carry_out, [queued])]


def _all_failed(batch: Sequence[QueuedOp], reason: str) -> list[OpResult]:
    return [OpResult(queued.op_id, False, reason) for queued in batch]


def _results(batch: Sequence[QueuedOp], statuses: Statuses) -> list[OpResult]:
    """Cut the statuses of a batch into the results of its ops."""
    results: list[OpResult] = []
    end = 0
    for queued in batch:
        begin, end = end, end + queued.num_blocks
        results.append(_result(queued, statuses[begin:end]))
    return results


def _result(queued: QueuedOp, statuses: Statuses) -> OpResult:
    failed = np.flatnonzero(statuses)
    if len(failed) == 0:
        return OpResult(queued.op_id, True)
    is_load = queued.scheduled.op.type is TransferType.DISK2H
    bad = np.flatnonzero(~np.isin(statuses, _NOT_BAD)) if is_load else failed[:0]
    retired = np.flatnonzero(statuses == errno.EINPROGRESS)
    first = int(statuses[failed[0]])
    return OpResult(
        queued.op_id,
        True,
        f"{len(failed)} of {len(statuses)} blocks failed, the first with {_describe(first)}",
        failed=tuple(failed.tolist()),
        bad=tuple(bad.tolist()),
        retired=tuple(retired.tolist()),
    )


def _describe(status: int) -> str:
    match status:
        case errno.EBADMSG:
            return "a wrong checksum"
        case errno.ENOENT:
            return "another block, or none, in its slot"
        case _:
            return f"{errno.errorcode.get(status, str(status))} ({os.strerror(status)})"


def _native_options(config: SsdTierConfig) -> _native.SsdOptions:
    return _native.SsdOptions(
        queue_depth=config.queue_depth,
        io_bytes=config.io_bytes,
        backend=config.backend,
        num_threads=config.num_threads,
        register_memory=config.register_memory,
        direct=config.direct,
        drain_timeout_ms=int(_DRAIN_S * 1000),
    )
