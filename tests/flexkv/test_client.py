"""Device workers in processes of their own: sockets, shared memory and what is left when one dies."""

import os
import stat
import threading

import pytest
import zmq
from tests.flexkv.device_memory import BLOCK, MODEL, fill_block, make_kv_caches, read_block, slots_of
from tests.flexkv.store_process import KEY, StoreProcess
from tests.flexkv.worker_process import WorkerProcess

from flexkv.common.config import CacheConfig, CpuTierConfig, ModelConfig
from flexkv.common.request import ResponseStatus
from flexkv.common.storage import PoolLayout
from flexkv.errors import ConfigError
from flexkv.kvmanager import KVManager
from flexkv.server import device_endpoint, request
from flexkv.server.client import KVTPClient
from flexkv.server.device_endpoint import DeviceEndpoint
from flexkv.server.runtime_dir import device_socket, ensure_private, store_dir, store_name
from flexkv.storage.allocator import CpuPool
from flexkv.transfer.worker import OpResult

TOKENS = list(range(2 * BLOCK))


@pytest.fixture
def store():
    with KVManager(MODEL, CacheConfig(CpuTierConfig(num_blocks=8), BLOCK)) as store:
        yield store
        store.check_integrity()


def pool_mappings() -> set[str]:
    """The pools mapped into this process, those of other tests included, each by its name with the address."""
    with open("/proc/self/maps") as maps:
        return {line for line in maps if "memfd:kvstrata-" in line}


def test_a_worker_in_another_process_moves_the_bytes(store):
    worker = WorkerProcess(store.device_dir)
    try:
        assert store.wait_ready(30.0)
        worker.ask("fill 1 11")
        worker.ask("fill 2 22")
        task = store.put_async(TOKENS, slots_of([1, 2]))
        assert store.wait([task])[task].ok
        task = store.get_async(TOKENS, slots_of([8, 7]))
        assert store.wait([task])[task].ok
        assert worker.ask("read 8") == worker.ask("read 1") != worker.ask("read 2")
        assert worker.ask("read 7") == worker.ask("read 2")
    finally:
        worker.close()


def test_a_killed_worker_fails_its_ops_and_a_new_one_serves(store):
    dead = WorkerProcess(store.device_dir, gated=True)  # its ops wait for a release that never comes
    assert store.wait_ready(30.0)
    waiting = store.put_async(TOKENS, slots_of([1, 2]))
    answered = threading.Event()
    threading.Thread(target=lambda: (store.wait([waiting], 30.0), answered.set())).start()
    dead.kill()
    assert answered.wait(20.0), "completion must not wait for the op's deadline"
    response = store.wait([waiting])[waiting]
    assert response.status is ResponseStatus.FAILED
    assert "died" in response.error
    assert store.stats().num_in_flight_blocks == 0
    assert not store.get_match(TOKENS)[1].any(), "what was never copied must not be found"

    worker = WorkerProcess(store.device_dir)
    try:
        assert worker.ask("ready") == "True"
        assert store.wait_ready(20.0)
        task = store.put_async(TOKENS, slots_of([1, 2]))
        assert store.wait([task])[task].ok
    finally:
        worker.close()


def test_two_ranks_share_a_block():
    model = ModelConfig(2, 3, 8, "float32", tp_size=2, model_id="tp2")
    caches = [make_kv_caches(model, 8, BLOCK) for _ in range(2)]
    for rank, kv_caches in enumerate(caches):
        for tensor in kv_caches.values():
            tensor[1] = rank + 1.0
    with KVManager(model, CacheConfig(CpuTierConfig(num_blocks=4), BLOCK)) as store:
        clients = [KVTPClient(store.device_dir, rank, model, BLOCK) for rank in range(2)]
        with clients[0], clients[1]:
            clients[0].register(caches[0])
            assert clients[0].wait_ready(20.0)
            assert not store.is_ready(), "one rank is not enough"
            clients[1].register(caches[1])
            assert store.wait_ready(20.0)
            task = store.put_async(TOKENS[:BLOCK], slots_of([1]))
            assert store.wait([task])[task].ok
            task = store.get_async(TOKENS[:BLOCK], slots_of([5]))
            assert store.wait([task])[task].ok
            for rank, kv_caches in enumerate(caches):
                assert all(bool((tensor[5] == rank + 1.0).all()) for tensor in kv_caches.values())
            clients[1].close()
            task = store.get_async(TOKENS[:BLOCK], slots_of([6]))
            assert not store.wait([task])[task].ok


def named_shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "kvstrata" in name}


def test_the_pool_leaves_nothing_behind():
    before = pool_mappings()
    with KVManager(MODEL, CacheConfig(CpuTierConfig(num_blocks=8), BLOCK)) as store:
        client = KVTPClient(store.device_dir, 0, MODEL, BLOCK)
        with client:
            client.register(make_kv_caches(MODEL, 4, BLOCK))
            assert store.wait_ready(20.0)
            made = pool_mappings() - before
            assert len(made) == 2, "the store's mapping and the worker's"
            assert named_shared_memory() == set(), "the pool has no name anybody could leave behind"
            assert stat.S_IMODE(store.device_dir.stat().st_mode) == 0o700
        assert len(made & pool_mappings()) == 1, "a closed client holds no memory, even while it is referenced"
    assert not made & pool_mappings()
    assert not store.device_dir.exists()


def received_until_bye(store: zmq.Socket) -> list[type]:
    types = []
    while request.Bye not in types:
        assert store.poll(20_000), f"no Bye after {types}"
        _, frame = store.recv_multipart()
        types.append(type(request.decode_from_device(frame)))
    return types


def test_nothing_piles_up_while_there_is_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(request, "HEARTBEAT_S", 0.002)
    beats = threading.Semaphore(0)
    beat = KVTPClient._beat
    monkeypatch.setattr(KVTPClient, "_beat", lambda *arguments: (beat(*arguments), beats.release()))
    directory = store_dir(tmp_path, "engine/dp0")
    ensure_private(directory)
    with KVTPClient(directory, 0, MODEL, BLOCK) as client, zmq.Context.instance().socket(zmq.ROUTER) as store:
        client.register(make_kv_caches(MODEL, 4, BLOCK))
        for _ in range(50):
            assert beats.acquire(timeout=20.0)
        monkeypatch.setattr(request, "HEARTBEAT_S", 600.0)
        store.bind(device_socket(directory))
        assert store.poll(20_000), "it registers as soon as there is a store, whenever the next heartbeat is"
        client.close()
        assert received_until_bye(store) == [request.Register, request.Bye]


def test_results_wait_for_a_store_that_comes_back(tmp_path):
    directory = store_dir(tmp_path, "engine/dp0")
    ensure_private(directory)
    with KVTPClient(directory, 0, MODEL, BLOCK) as client, zmq.Context.instance().socket(zmq.ROUTER) as store:
        client.register(make_kv_caches(MODEL, 4, BLOCK))
        for op_id in range(3):
            client._post_result(OpResult(op_id, True))
        store.bind(device_socket(directory))
        frames = []
        while len(frames) < 4:
            assert store.poll(20_000)
            frames.append(request.decode_from_device(store.recv_multipart()[1]))
        assert [frame.op_id for frame in frames[:3]] == [0, 1, 2]
        assert isinstance(frames[3], request.Register), "a store that does not know us yet ignores what it cannot place"


def test_an_endpoint_whose_thread_hangs_keeps_its_sockets(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(device_endpoint, "_CLOSE_TIMEOUT_S", 0.05)
    entered, leave = threading.Event(), threading.Event()

    class Hanging(DeviceEndpoint):
        def _step(self) -> None:
            entered.set()
            assert leave.wait(20.0)
            super()._step()

    layout = PoolLayout(4, MODEL.rank_block_bytes(BLOCK), 0)
    with CpuPool.create(layout) as pool:
        endpoint = Hanging(MODEL, BLOCK, pool, tmp_path)
        endpoint.start(lambda result: None)
        assert entered.wait(20.0)
        endpoint.close()
        endpoint.close()
        assert "did not end" in caplog.text
        assert not endpoint._socket.closed, "its thread may be using it"
        leave.set()
        endpoint._thread.join(20.0)
        assert endpoint._socket.closed
        os.close(endpoint._wake)


def test_a_worker_of_another_shape_is_refused(store, monkeypatch):
    refused = threading.Event()
    reasons: list[str] = []

    def note_refusal(client: KVTPClient, reason: str) -> None:
        reasons.append(reason)
        refused.set()

    monkeypatch.setattr(KVTPClient, "_note_refusal", note_refusal)
    model = ModelConfig(2, 1, 8, "float32")
    with KVTPClient(store.device_dir, 0, model, BLOCK) as client:
        client.register(make_kv_caches(model, 4, BLOCK))
        assert refused.wait(20.0)
        assert not client.wait_ready(0.0)
        assert not store.is_ready()
    assert "bytes" in reasons[0]


def test_a_rank_that_is_taken_is_refused(store):
    with (
        KVTPClient(store.device_dir, 0, MODEL, BLOCK) as first,
        KVTPClient(store.device_dir, 0, MODEL, BLOCK) as second,
    ):
        first.register(make_kv_caches(MODEL, 4, BLOCK))
        assert first.wait_ready(20.0)
        second.register(make_kv_caches(MODEL, 4, BLOCK))
        assert not second.wait_ready(0.5)
        first.close()
        assert second.wait_ready(20.0), "the place is free again"


def test_registering_never_waits_for_a_heartbeat(monkeypatch):
    monkeypatch.setattr(request, "HEARTBEAT_S", 600.0)
    cache = CacheConfig(CpuTierConfig(num_blocks=2), BLOCK)
    for _ in range(20):
        with KVManager(MODEL, cache) as store, KVTPClient(store.device_dir, 0, MODEL, BLOCK) as client:
            client.register(make_kv_caches(MODEL, 4, BLOCK))
            assert store.wait_ready(20.0)


def test_a_worker_may_come_before_its_store(tmp_path):
    directory = store_dir(tmp_path, "engine/dp0")
    with KVTPClient(directory, 0, MODEL, BLOCK) as client:
        client.register(make_kv_caches(MODEL, 4, BLOCK))
        cache = CacheConfig(CpuTierConfig(num_blocks=8), BLOCK)
        for _ in range(2):  # and outlive it
            with KVManager(MODEL, cache, runtime_dir=tmp_path, store_key="engine") as store:
                assert store.device_dir == directory
                assert store.wait_ready(20.0)
                task = store.put_async(TOKENS, slots_of([1, 2]))
                assert store.wait([task])[task].ok


def test_garbage_on_the_socket_is_dropped(store, caplog):
    with zmq.Context.instance().socket(zmq.DEALER) as stranger:
        stranger.linger = 1000
        stranger.connect(device_socket(store.device_dir))
        for frame in (b"", b"\xff\xff", b"\x93\xa4Ping", bytes(1000)):
            stranger.send(frame)
        with KVTPClient(store.device_dir, 0, MODEL, BLOCK) as client:
            client.register(make_kv_caches(MODEL, 4, BLOCK))
            assert store.wait_ready(20.0)


def test_directories_that_others_may_enter_are_refused(tmp_path):
    open_dir = tmp_path / "open"
    open_dir.mkdir(mode=0o777)
    open_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="0700"):
        ensure_private(open_dir)
    with pytest.raises(ConfigError, match="too long"):
        store_dir(tmp_path / ("x" * 100), "engine")


def end_of_task(client: KVTPClient, task: int) -> str:
    pause = threading.Event()
    for _ in range(4000):
        ended = client.take_ended()
        if task in ended:
            return ended[task]
        pause.wait(0.005)
    raise AssertionError("the task never ended")


def test_a_killed_store_fails_its_loads_and_the_next_one_serves(tmp_path, monkeypatch):
    monkeypatch.setattr(request, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(request, "SILENCE_S", 1.5)
    kv_caches = make_kv_caches(MODEL, 8, BLOCK)
    fill_block(kv_caches, 1, seed=1)
    store = StoreProcess(tmp_path)
    directory = store_dir(tmp_path, store_name(KEY, 0))
    with KVTPClient(directory, 0, MODEL, BLOCK, gated=True) as client:
        client.register(kv_caches)
        assert store.ask("ready") == "True"
        task = int(store.ask("put 1"))
        client.release([task], 20.0)
        assert store.receive() == "success"
        assert end_of_task(client, task) == ""

        store.kill()
        client.release([task + 1], 60.0)  # the engine was told to load, and does not know yet
        assert end_of_task(client, task + 1) in ("the store is silent", "there is no store")
        assert named_shared_memory() == set()
        assert (directory / "device.sock").exists(), "a killed store cannot clean up"

        store = StoreProcess(tmp_path)  # of the same key: it takes over the directory
        assert store.ask("ready") == "True"
        for block, command in ((1, "put"), (5, "get")):
            task = int(store.ask(f"{command} {block}"))
            client.release([task], 20.0)
            assert store.receive() == "success"
            assert end_of_task(client, task) == ""
        assert read_block(kv_caches, 5) == read_block(kv_caches, 1)
        store.close()
    assert list(tmp_path.iterdir()) == []
