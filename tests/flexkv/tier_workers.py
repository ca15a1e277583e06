"""Workers of the tiers below host memory over real storage, and blocks whose bytes follow from their names."""

import hashlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flexkv.common.config import CacheConfig, CpuTierConfig, ModelConfig, RemoteTierConfig, SsdTierConfig
from flexkv.common.transfer import BlockContent, TransferOp, TransferType
from flexkv.storage.storage_engine import StorageEngine
from flexkv.transfer.remote_worker import RemoteWorker
from flexkv.transfer.ssd_worker import SsdWorker
from flexkv.transfer.worker import OpResult, ScheduledOp, TransferWorker

PATIENCE_S = 60.0
MODEL = ModelConfig(num_layers=3, num_kv_heads=1, head_size=50, dtype="uint8", model_id="m")
BLOCK_BYTES = MODEL.block_bytes(16)  # 4,800: no multiple of 4096
NUM_POOL_BLOCKS = 12
NUM_SLOTS = 10
LAYOUT = "v1;layers=3;test"


def ids(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)


def name_of(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def bytes_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, BLOCK_BYTES, np.uint8)


def content_of(numbers: Sequence[int], namespace: tuple[str, ...] = ()) -> BlockContent:
    """Blocks that each are the first of their sequence."""
    names = b"".join(map(name_of, numbers))
    hashes = np.frombuffer(names, np.uint8).reshape(len(numbers), 32)
    return BlockContent(hashes, np.zeros_like(hashes), namespace)


def ssd_config(*directories: Path, **options) -> CacheConfig:
    tier = SsdTierConfig(directories, num_blocks=options.pop("num_blocks", NUM_SLOTS), **options)
    return CacheConfig(CpuTierConfig(num_blocks=NUM_POOL_BLOCKS), ssd=tier)


def remote_config(url: str, **options) -> CacheConfig:
    deadlines = {"get_deadline_s": PATIENCE_S, "put_deadline_s": PATIENCE_S} | options
    return CacheConfig(CpuTierConfig(num_blocks=NUM_POOL_BLOCKS), remote=RemoteTierConfig(url, **deadlines))


class Bench:
    """A worker, the storage below it, and the results it reports."""

    def __init__(self, storage: StorageEngine, worker: TransferWorker, load: TransferType, store: TransferType) -> None:
        self.storage, self.worker = storage, worker
        self.blocks = storage.cpu_pool.blocks()
        self.results: dict[int, list[OpResult]] = {}
        self._load, self._store = load, store
        self._changed = threading.Condition()
        self._task_ids = itertools.count(1)

    def report(self, result: OpResult) -> None:
        with self._changed:
            self.results.setdefault(result.op_id, []).append(result)
            self._changed.notify_all()

    def hold(self, kind: TransferType) -> threading.Event:
        """Keep one thread of a lane busy until the event is set."""
        gate, is_held = threading.Event(), threading.Event()

        def wait() -> None:
            is_held.set()
            assert gate.wait(PATIENCE_S)

        self.worker._lanes[kind].call(wait)
        assert is_held.wait(PATIENCE_S)
        return gate

    def wait(self, op_id: int) -> OpResult:
        with self._changed:
            assert self._changed.wait_for(lambda: op_id in self.results, PATIENCE_S), "it was never reported"
            return self.results[op_id][0]

    def submit(self, op: TransferOp, timeout_s: float = PATIENCE_S) -> int:
        self.worker.submit(ScheduledOp(op, next(self._task_ids), 1, timeout_s))
        return op.op_id

    def store_op(self, numbers, slots, blocks, namespace=()) -> TransferOp:
        return TransferOp(self._store, ids(blocks), ids(slots), content=content_of(numbers, namespace))

    def load_op(self, numbers, slots, blocks, namespace=()) -> TransferOp:
        return TransferOp(self._load, ids(slots), ids(blocks), content=content_of(numbers, namespace))

    def store(self, numbers, slots=None, blocks=None, **options) -> OpResult:
        """Fill pool blocks with these blocks, and store them."""
        blocks = range(len(numbers)) if blocks is None else blocks
        for number, block in zip(numbers, blocks, strict=True):
            self.blocks[block] = bytes_of(number)
        return self.wait(self.submit(self.store_op(numbers, numbers if slots is None else slots, blocks, **options)))

    def load(self, numbers, slots=None, blocks=None, **options) -> OpResult:
        blocks = range(len(numbers)) if blocks is None else blocks
        return self.wait(self.submit(self.load_op(numbers, numbers if slots is None else slots, blocks, **options)))

    def holds(self, numbers, blocks=None) -> bool:
        """Whether pool blocks hold these blocks."""
        blocks = range(len(numbers)) if blocks is None else blocks
        return all((self.blocks[b] == bytes_of(n)).all() for n, b in zip(numbers, blocks, strict=True))


@contextmanager
def open_bench(cache: CacheConfig, model: ModelConfig = MODEL, op_timeout_s: float = PATIENCE_S) -> Iterator[Bench]:
    """Open the storage, start the worker of its SSD or remote tier; leave nothing behind."""
    threads = set(threading.enumerate())
    with StorageEngine(model, cache) as storage:
        storage.bind_layout(LAYOUT)
        worker: TransferWorker
        if storage.ssd is not None:
            worker = SsdWorker(storage.ssd, storage.cpu_pool, op_timeout_s)
            bench = Bench(storage, worker, TransferType.DISK2H, TransferType.H2DISK)
        else:
            assert storage.remote is not None
            assert cache.remote is not None
            worker = RemoteWorker(storage.remote, storage.remote_keys, storage.cpu_pool, cache.remote)
            bench = Bench(storage, worker, TransferType.REMOTE2H, TransferType.H2REMOTE)
        worker.start(bench.report)
        try:
            yield bench
        finally:
            worker.close()
            del bench.blocks
    assert set(threading.enumerate()) <= threads
    assert all(len(results) == 1 for results in bench.results.values()), "an op was reported twice"
