"""The SSD worker: damage is told block by block, a disk that fails or hangs takes nobody's memory, rows follow data."""

import errno
import threading

import numpy as np
import pytest
from tests.flexkv.tier_workers import (
    BLOCK_BYTES,
    MODEL,
    NUM_SLOTS,
    PATIENCE_S,
    Bench,
    bytes_of,
    content_of,
    ids,
    open_bench,
    ssd_config,
)

from flexkv.common.transfer import BlockContent, TransferOp, TransferOpGraph, TransferType
from flexkv.errors import ConfigError, TransferError
from flexkv.storage.ssd_files import slot_bytes
from flexkv.storage.storage_engine import StorageEngine
from flexkv.transfer import ssd_worker
from flexkv.transfer.ssd_worker import SsdWorker
from flexkv.transfer.transfer_engine import TransferEngine


@pytest.fixture
def cache(tmp_path):
    return ssd_config(tmp_path / "ssd")


@pytest.fixture
def bench(cache):
    with open_bench(cache) as bench:
        yield bench


def flip_a_bit(bench: Bench, slot: int) -> None:
    """Damage the block of a slot on disk."""
    (path,) = bench.storage.ssd.store.files.paths
    with open(path, "r+b") as file:
        file.seek(slot * slot_bytes(BLOCK_BYTES) + 1234)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


class FaultyTransfer:
    """Stands for the native transfer; says of each block what it is told to, or raises."""

    def __init__(self, real, statuses=None, error=None):
        self.real, self.statuses, self.error = real, statuses, error
        self.num_calls = 0

    def _statuses(self, count):
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        return np.array(self.statuses[:count], np.int32)

    def read(self, slots, pool_blocks, checksums, timeout_s):
        return self._statuses(len(slots))

    def write(self, slots, pool_blocks, timeout_s):
        _, checksums = self.real.write(slots, pool_blocks, timeout_s)
        return self._statuses(len(slots)), checksums


def break_disk(disk, **faults) -> FaultyTransfer:
    disk.transfer = FaultyTransfer(disk.transfer, **faults)
    return disk.transfer


def test_a_damaged_block_is_bad_and_is_not_there_after_a_restart(cache):
    with open_bench(cache) as bench:
        assert bench.store([1, 2, 3]).is_complete
        flip_a_bit(bench, slot=2)
        result = bench.load([1, 2, 3], blocks=[4, 5, 6])
        assert (result.ok, result.failed, result.bad, result.retired) == (True, (1,), (1,), ())
        assert "wrong checksum" in result.error
        assert bench.holds([1, 3], blocks=[4, 6])
        assert bench.worker.stats()[TransferType.DISK2H].num_bad_blocks == 1
        assert bench.store([4]).is_complete  # comes after the row of block 2 is gone
        assert bench.load([2]).bad == (0,), "its slot is not read again"
    with open_bench(cache) as bench:
        found = bench.storage.ssd.take_found().blocks
        assert sorted(found.slots.tolist()) == [1, 3, 4]


def test_a_slot_that_holds_another_block_is_not_served(bench):
    assert bench.store([1, 2]).is_complete
    result = bench.load([1, 2], slots=[2, 2], blocks=[5, 6])
    assert (result.failed, result.bad) == ((0,), (0,))
    assert bench.load([2], blocks=[7]).is_complete, "the block that is there stays"


@pytest.mark.parametrize("status", [errno.EIO, errno.ETIMEDOUT])
def test_failing_reads_fail_their_blocks_and_only_damage_makes_them_bad(bench, status):
    assert bench.store([1, 2, 3]).is_complete
    break_disk(bench.worker._reader, statuses=[0, status, 0])
    result = bench.load([1, 2, 3])
    assert (result.ok, result.failed) == (True, (1,))
    assert result.bad == ((1,) if status == errno.EIO else ())
    assert errno.errorcode[status] in result.error


def test_blocks_that_could_not_be_written_have_no_row(cache):
    with open_bench(cache) as bench:
        break_disk(bench.worker._writer, statuses=[0, errno.ENOSPC, 0, errno.EIO])
        result = bench.store([1, 2, 3, 4])
        assert (result.ok, result.failed, result.bad) == (True, (1, 3), ())
        assert bench.load([1, 2, 3, 4]).failed == (1, 3)
    with open_bench(cache) as bench:
        assert sorted(bench.storage.ssd.take_found().blocks.slots.tolist()) == [1, 3]


def test_the_old_row_is_gone_before_its_slot_is_written(cache):
    with open_bench(cache) as bench:
        assert bench.store([1], slots=[5]).is_complete
        break_disk(bench.worker._writer, statuses=[errno.EIO])
        assert bench.store([2], slots=[5]).failed == (0,)
        assert bench.load([1], slots=[5]).failed == (0,)
        assert bench.storage.ssd.store.index.num_blocks == 0


def test_an_index_that_cannot_be_changed_fails_its_writes_only(bench, monkeypatch):
    assert bench.store([1]).is_complete
    index = bench.storage.ssd.store.index

    def refuse(*_):
        raise TransferError("the disk is full")

    monkeypatch.setattr(index, "insert", refuse)
    assert bench.store([2]).failed == (0,)
    monkeypatch.setattr(index, "delete", refuse)
    result = bench.store([3], slots=[1])
    assert not result.ok
    assert "the disk is full" in result.error
    assert bench.load([1]).failed == (0,), "its slot may be written any time"
    monkeypatch.undo()
    assert bench.store([2, 3]).is_complete
    assert bench.load([2, 3]).is_complete


@pytest.mark.parametrize("faults", [{"statuses": [0, errno.EINPROGRESS]}, {"error": TransferError("the ring broke")}])
def test_a_request_that_never_comes_back_retires_its_memory(tmp_path, monkeypatch, faults):
    lost = []
    monkeypatch.setattr(ssd_worker, "_lost_pools", lost)
    storage = StorageEngine(MODEL, ssd_config(tmp_path / "ssd"))
    storage.bind_layout("x")
    worker = SsdWorker(storage.ssd, storage.cpu_pool, PATIENCE_S)
    bench = Bench(storage, worker, TransferType.DISK2H, TransferType.H2DISK)
    worker.start(bench.report)
    assert bench.store([1, 2]).is_complete
    faulty = break_disk(worker._reader, **faults)
    result = bench.load([1, 2])
    everything = (1,) if "statuses" in faults else (0, 1)
    assert (result.failed, result.bad, result.retired) == (everything, (), everything)
    result = bench.load([1])
    assert not result.ok
    assert "out of service" in result.error
    assert faulty.num_calls == 1
    assert bench.store([3]).is_complete, "the other direction goes on"
    worker.close()
    storage.close()
    assert len(lost) == 1
    lost[0][0] = 1  # mapped still: what comes late hits nobody else's memory


def test_two_ops_at_odds_do_not_fail_the_others_of_their_batch(bench):
    assert bench.store([1, 2, 3]).is_complete
    gate = bench.hold(TransferType.DISK2H)
    ops = [bench.load_op([1], [1], [4]), bench.load_op([2], [2], [4]), bench.load_op([3, 3], [3, 3], [5, 5])]
    good = bench.load_op([3], [3], [6])
    for op in (*ops, good):
        bench.submit(op)
    gate.set()
    assert bench.wait(good.op_id).is_complete
    assert bench.holds([3], blocks=[6])
    result = bench.wait(ops[2].op_id)
    assert not result.ok
    assert "twice" in result.error


def test_cancelling_drops_what_has_not_begun(bench):
    assert bench.store([1]).is_complete
    gate = bench.hold(TransferType.DISK2H)
    bench.blocks[4] = 9
    cancelled, kept = bench.load_op([1], [1], [4]), bench.load_op([1], [1], [5])
    bench.submit(cancelled)
    bench.submit(kept)
    assert bench.worker.stats()[TransferType.DISK2H].num_queued == 2
    bench.worker.cancel(cancelled.op_id)
    bench.worker.cancel(12345)
    result = bench.wait(cancelled.op_id)
    assert (result.ok, result.error, result.is_data_bad) == (False, "cancelled", False)
    gate.set()
    assert bench.wait(kept.op_id).is_complete
    assert (bench.blocks[4] == 9).all()
    bench.worker.cancel(kept.op_id)  # over already


def test_an_op_that_is_late_never_begins(bench):
    bench.blocks[:] = 7
    result = bench.wait(bench.submit(bench.load_op([1], [1], [1]), timeout_s=0.0))
    assert not result.ok
    assert "deadline" in result.error
    assert (bench.blocks == 7).all()
    assert bench.worker.stats()[TransferType.DISK2H].num_failed_ops == 1


def test_a_queue_that_is_full_refuses(bench, monkeypatch):
    monkeypatch.setattr("flexkv.transfer.lane._MOST_QUEUED", 2)
    assert bench.store([1]).is_complete
    gate = bench.hold(TransferType.DISK2H)
    op_ids = [bench.submit(bench.load_op([1], [1], [block])) for block in range(3)]
    assert "2 ops wait" in bench.wait(op_ids[2]).error
    gate.set()
    assert all(bench.wait(op_id).is_complete for op_id in op_ids[:2])


def test_forgetting_outlives_a_restart(cache):
    with open_bench(cache) as bench:
        assert bench.store([1, 2, 3]).is_complete
        bench.worker.forget(ids([2])).result(PATIENCE_S)
        assert bench.load([1, 2, 3]).failed == (1,)
    with open_bench(cache) as bench:
        assert sorted(bench.storage.ssd.take_found().blocks.slots.tolist()) == [1, 3]
        bench.worker.forget(None).result(PATIENCE_S)
        bench.worker.close()
        with pytest.raises(TransferError, match="closed"):
            bench.worker.forget(None).result(PATIENCE_S)
    with open_bench(cache) as bench:
        assert len(bench.storage.ssd.take_found().blocks) == 0


def test_chains_come_back_as_chains_and_orphans_do_not(cache):
    with open_bench(cache) as bench:
        names = content_of([1, 2, 3, 4]).hashes
        for first, count in ((0, 2), (3, 1)):  # block 2 of the sequence is never stored
            numbers = list(range(first, first + count))
            for block, number in enumerate(numbers):
                bench.blocks[block] = bytes_of(number)
            content = BlockContent.of_run(names, first, count, ("a", "b"))
            op = TransferOp(TransferType.H2DISK, ids(range(count)), ids(numbers), content=content)
            assert bench.wait(bench.submit(op)).is_complete
    with open_bench(cache) as bench:
        found = bench.storage.ssd.take_found()
        assert found.blocks.slots.tolist() == [0, 1]
        assert found.parent_rows.tolist() == [-1, 0]
        assert found.orphan_slots.tolist() == [3]
        namespaces = bench.storage.ssd.store.index.namespaces()
        assert {namespaces[i] for i in found.blocks.namespace_ids.tolist()} == {("a", "b")}
        assert bench.storage.ssd.store.index.num_blocks == 2, "the orphan is deleted"


class Listener:
    """Hears how graphs end."""

    def __init__(self):
        self.results, self.finished = {}, threading.Event()

    def on_op_finished(self, task_id, result):
        self.results[result.op_id] = result

    def on_graph_finished(self, task_id):
        self.finished.set()


def test_the_transfer_engine_runs_graphs_over_it(tmp_path):
    with StorageEngine(MODEL, ssd_config(tmp_path)) as storage:
        worker, listener = SsdWorker(storage.ssd, storage.cpu_pool, PATIENCE_S), Listener()
        kinds = (TransferType.DISK2H, TransferType.H2DISK)
        engine = TransferEngine(dict.fromkeys(kinds, worker), listener, PATIENCE_S)
        blocks = storage.cpu_pool.blocks()
        blocks[0] = bytes_of(1)
        graph = TransferOpGraph()
        write = graph.add_op(TransferOp(TransferType.H2DISK, ids([0]), ids([3]), content=content_of([1])))
        read = graph.add_op(TransferOp(TransferType.DISK2H, ids([3]), ids([5]), content=content_of([1])))
        graph.add_dependency(read.op_id, write.op_id)
        engine.start()
        engine.submit(graph, task_id=1)
        assert listener.finished.wait(PATIENCE_S)
        engine.close()
        assert [listener.results[op.op_id].is_complete for op in (write, read)] == [True, True]
        assert (blocks[5] == bytes_of(1)).all()
        del blocks


def test_every_slot_can_be_used(bench):
    numbers = list(range(NUM_SLOTS))
    assert bench.store(numbers).is_complete
    assert bench.load(numbers).is_complete
    assert bench.holds(numbers)
    result = bench.store([1], slots=[NUM_SLOTS])
    assert f"slots {NUM_SLOTS}..{NUM_SLOTS}" in result.error


def test_pool_blocks_are_moved_in_place(bench):
    layout = bench.storage.cpu_pool.layout
    assert (layout.block_bytes, layout.block_stride) == (BLOCK_BYTES, 8192)
    assert not bench.worker._reader.transfer.is_bounced


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    with StorageEngine(MODEL, ssd_config(tmp_path / "ssd")) as storage:
        for path in storage.ssd.store.files.paths:
            path.unlink()
        with pytest.raises(ConfigError, match="the SSD tier cannot be used"):
            SsdWorker(storage.ssd, storage.cpu_pool, PATIENCE_S)
