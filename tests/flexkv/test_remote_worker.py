"""The remote worker: misses are blocks that failed, a store that hangs delays nobody beyond the deadline."""

import socket
import threading

import numpy as np
import pytest
from tests.flexkv.remote_servers import eventually
from tests.flexkv.tier_workers import LAYOUT, MODEL, PATIENCE_S, Bench, bytes_of, open_bench, remote_config

from flexkv.common.transfer import TransferType
from flexkv.storage.storage_engine import StorageEngine
from flexkv.transfer.remote_worker import RemoteWorker

GET, PUT = TransferType.REMOTE2H, TransferType.H2REMOTE


class SlowStore:
    """Holds every call until it is let go."""

    def __init__(self):
        self.gate = threading.Event()
        self.num_running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def get(self, keys, buffers, deadline):
        with self._lock:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        assert self.gate.wait(PATIENCE_S)
        with self._lock:
            self.num_running -= 1
        return np.ones(len(keys), np.bool_)

    put = get


@pytest.fixture
def silent_server():
    """A socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def test_a_hanging_store_is_a_miss_within_the_deadline(silent_server):
    # That this test ends is what it tests: nothing ever answers, and only the deadlines are short.
    cache = remote_config(f"redis://127.0.0.1:{silent_server}", get_deadline_s=0.2, put_deadline_s=0.2)
    with open_bench(cache) as bench:
        result = bench.load([1, 2])
        assert (result.ok, result.failed, result.bad, result.retired) == (True, (0, 1), (), ())
        result = bench.store([1, 2])
        assert (result.ok, result.failed) == (True, (0, 1)), "counted, and harmless"
        stats = bench.worker.stats()
        assert (stats[GET].num_ops, stats[GET].num_failed_blocks, stats[GET].num_blocks) == (1, 2, 0)
        assert stats[PUT].num_failed_blocks == 2


def test_ops_that_wait_behind_a_hanging_store_have_the_same_deadline(silent_server):
    cache = remote_config(f"redis://127.0.0.1:{silent_server}", get_deadline_s=0.2, num_get_threads=1)
    with open_bench(cache) as bench:
        op_ids = [bench.submit(bench.load_op([n], [], [n])) for n in range(10)]
        assert all(not bench.wait(op_id).is_complete for op_id in op_ids)


@pytest.fixture
def slow(tmp_path):
    """A worker of two get threads over a store that waits."""
    cache = remote_config(f"file://{tmp_path}", num_get_threads=2)
    with StorageEngine(MODEL, cache) as storage:
        storage.bind_layout(LAYOUT)
        store = SlowStore()
        worker = RemoteWorker(store, storage.remote_keys, storage.cpu_pool, cache.remote)
        bench = Bench(storage, worker, GET, PUT)
        worker.start(bench.report)
        yield bench, store
        store.gate.set()
        worker.close()
        del bench.blocks


def test_as_many_ops_run_at_once_as_there_are_threads(slow):
    bench, store = slow
    op_ids = [bench.submit(bench.load_op([n], [], [n])) for n in range(4)]
    eventually(lambda: store.num_running == 2)
    assert bench.worker.stats()[GET].num_queued == 2
    bench.worker.cancel(op_ids[0])  # has begun: it runs to its end
    bench.worker.cancel(op_ids[3])
    assert bench.wait(op_ids[3]).error == "cancelled"
    assert op_ids[0] not in bench.results
    store.gate.set()
    assert all(bench.wait(op_id).is_complete for op_id in op_ids[:3])
    assert store.most_running == 2


def test_puts_go_on_while_gets_wait(tmp_path):
    cache = remote_config(f"file://{tmp_path}", num_get_threads=1)
    with open_bench(cache) as bench:
        gate = bench.hold(GET)
        op_id = bench.submit(bench.load_op([1], [], [5]))
        assert bench.store([1]).is_complete
        assert op_id not in bench.results
        gate.set()
        assert bench.wait(op_id).is_complete
        assert bench.holds([1], blocks=[5])


def test_closing_lets_a_running_call_end(slow):
    bench, store = slow
    op_ids = [bench.submit(bench.load_op([n], [], [n])) for n in range(3)]
    eventually(lambda: store.num_running == 2)
    closer = threading.Thread(target=bench.worker.close)
    closer.start()
    assert bench.wait(op_ids[2]).error == "the store closes"
    assert op_ids[0] not in bench.results, "its memory is in use"
    store.gate.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert bench.wait(op_ids[0]).is_complete
    assert bench.wait(op_ids[1]).is_complete


def test_a_call_that_never_ends_retires_its_blocks(slow, monkeypatch):
    bench, store = slow
    lane = bench.worker._lanes[GET]
    monkeypatch.setattr(lane, "_config", lane._config.__class__(**_fields(lane._config) | {"close_timeout_s": 0.05}))
    op_id = bench.submit(bench.load_op([1, 2], [], [1, 2]))
    eventually(lambda: store.num_running == 1)
    assert not lane.close()
    result = bench.wait(op_id)
    assert (result.ok, result.retired) == (False, (0, 1))
    store.gate.set()
    assert lane.close()
    assert len(bench.results[op_id]) == 1


def _fields(config):
    return {name: getattr(config, name) for name in config.__slots__}


def test_a_store_that_raises_fails_the_op_and_not_the_worker(slow, monkeypatch):
    bench, store = slow
    store.gate.set()
    with monkeypatch.context() as patch:
        patch.setattr(store, "get", lambda *_: 1 / 0)
        result = bench.load([1])
        assert not result.ok
        assert "ZeroDivisionError" in result.error
    assert bench.load([1]).is_complete


def test_a_tier_to_read_only_takes_no_puts(tmp_path):
    with open_bench(remote_config(f"file://{tmp_path}")) as bench:
        assert bench.store([1]).is_complete
    with open_bench(remote_config(f"file://{tmp_path}", write="none")) as bench:
        result = bench.store([2])
        assert not result.ok
        assert "takes no H2REMOTE" in result.error
        assert bench.load([1]).is_complete
        assert list(bench.worker.stats()) == [GET]


def test_namespaces_and_layouts_do_not_meet(tmp_path):
    url = f"file://{tmp_path}"
    with open_bench(remote_config(url, namespace="one")) as bench:
        assert bench.store([1], namespace=("a",)).is_complete
        assert bench.load([1], namespace=("b",)).failed == (0,)
        assert bench.load([1]).failed == (0,)
        assert bench.load([1], namespace=("a",)).is_complete
    with open_bench(remote_config(url, namespace="two")) as bench:
        assert bench.load([1], namespace=("a",)).failed == (0,)
    with open_bench(remote_config(url, namespace="one")) as bench:
        bench.storage._remote_fingerprint = "another layout"
        assert bench.load([1], namespace=("a",)).failed == (0,)


def test_damage_is_a_miss(tmp_path):
    with open_bench(remote_config(f"file://{tmp_path}")) as bench:
        assert bench.store([1, 2]).is_complete
        path = next(path for path in (tmp_path / "blocks").rglob("*") if path.is_file())
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        result = bench.load([1, 2], blocks=[5, 6])
        assert len(result.failed) == 1
        good = 1 - result.failed[0]
        assert (bench.blocks[5 + good] == bytes_of(1 + good)).all()
        assert bench.storage.remote.stats().bad_values == 1


def test_before_a_layout_is_known_ops_fail(tmp_path):
    cache = remote_config(f"file://{tmp_path}")
    with StorageEngine(MODEL, cache) as storage:
        worker = RemoteWorker(storage.remote, storage.remote_keys, storage.cpu_pool, cache.remote)
        bench = Bench(storage, worker, GET, PUT)
        worker.start(bench.report)
        result = bench.store([1])
        assert not result.ok
        assert "before a device worker has registered" in result.error
        worker.close()
        del bench.blocks
