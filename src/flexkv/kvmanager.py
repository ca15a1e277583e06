"""`KVManager`: the one API of the store.

    with KVManager(model_config, cache_config) as store:
        task, mask = store.get_match(token_ids)              # what is stored, in whole blocks
        store.launch([task], [slots_of_those_tokens])         # device slot = block id * tokens_per_block + offset
        store.wait([task])                                     # now it is on the device

Bytes move between the pool and the engine's tensors by a `KVTPClient` per tensor-parallel rank, which finds the store
at `device_dir`. Until every rank is there, gets are misses and puts store nothing.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flexkv.cache.global_cache_engine import GlobalCacheEngine
from flexkv.cache.plans import CachePlan, CacheStats
from flexkv.common.block import Namespace, SequenceMeta
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponse
from flexkv.common.slots import as_array, block_run, slots_to_blocks
from flexkv.common.transfer import TransferType
from flexkv.errors import FlexKVError, InvalidRequestError
from flexkv.kvtask import KVTaskEngine
from flexkv.server.device_endpoint import DeviceEndpoint
from flexkv.server.runtime_dir import StoreDir, store_name
from flexkv.storage.storage_engine import StorageEngine
from flexkv.transfer.remote_worker import RemoteWorker
from flexkv.transfer.ssd_worker import SsdWorker
from flexkv.transfer.transfer_manager import ThreadTransferManager
from flexkv.transfer.worker import TransferWorker
from kvblocks.events import BlockRemoved, BlockStored
from kvblocks.hashing import BlockHasher

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
_SHUTDOWN_TIMEOUT_S = 5.0
_FORGET_TIMEOUT_S = 20.0


class KVManager:
    """A store within this process. Thread-safe. `start`, `shutdown` and leaving its context are idempotent.

    Token ids are 1-D integers (list, numpy array or CPU tensor) and never changed. Masks are bool `[num_tokens]`, one
    run of True from a block boundary on; what lies behind the last full block is dropped.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: CacheConfig,
        *,
        dp_client_id: int = 0,
        runtime_dir: Path | None = None,
        store_key: str = "",
    ) -> None:
        """Allocate the tiers and open the sockets of the store.

        Args:
            model_config: the shape of a block.
            cache_config: the tiers.
            dp_client_id: the engine's data-parallel rank; engines of different ranks have stores of their own.
            runtime_dir: private directory for sockets, shared with device workers of other processes; None for one of
                this store's own, removed with it.
            store_key: names the store within `runtime_dir`, so that device workers find it; empty for a random one.

        Raises:
            ConfigError: a tier that cannot be, or another live store of that key.
        """
        self._model = model_config
        self._cache_config = cache_config
        self._hasher = BlockHasher(cache_config.hash_algorithm, cache_config.hash_seed, cache_config.tokens_per_block)
        self._own_root = None if runtime_dir else tempfile.TemporaryDirectory(prefix="kvstrata-")
        root = runtime_dir or Path(self._own_root.name if self._own_root else "")
        key = store_name(store_key or secrets.token_hex(8), dp_client_id)
        self._lock = threading.Lock()
        self._is_started = False  # protected by _lock
        self._is_shut_down = False  # protected by _lock
        self._resources = contextlib.ExitStack()
        self._resources.callback(self._remove_directory)
        self._store_dir = StoreDir(root, key)
        self._ssd_worker: SsdWorker | None = None
        op_timeout_s = cache_config.transfer.op_timeout_s
        try:
            storage = self._resources.enter_context(StorageEngine(model_config, cache_config))
            pool = storage.cpu_pool
            self._endpoint = DeviceEndpoint(
                model_config, cache_config.tokens_per_block, pool, self._store_dir.path, storage.bind_layout
            )
            self._resources.callback(self._endpoint.close)
            workers: dict[TransferType, TransferWorker] = dict.fromkeys(
                (TransferType.H2D, TransferType.D2H), self._endpoint
            )
            if storage.ssd is not None:
                self._ssd_worker = SsdWorker(storage.ssd, pool, op_timeout_s)
                self._resources.callback(self._ssd_worker.close)
                workers |= dict.fromkeys((TransferType.DISK2H, TransferType.H2DISK), self._ssd_worker)
            find_remotely = None
            if storage.remote is not None:
                assert cache_config.remote is not None
                remote = RemoteWorker(storage.remote, storage.remote_keys, pool, cache_config.remote)
                self._resources.callback(remote.close)
                find_remotely = remote.find
                workers[TransferType.REMOTE2H] = workers[TransferType.H2REMOTE] = remote
            cache = self._make_cache_engine(storage)
        except FlexKVError:
            self._resources.close()
            raise
        transfer = ThreadTransferManager(workers, op_timeout_s)
        self._tasks = KVTaskEngine(cache, transfer, cache_config.transfer.max_tasks, find_remotely)
        logger.info("store made cpu_blocks=%d block_bytes=%d", pool.layout.num_blocks, pool.layout.block_bytes)

    def _make_cache_engine(self, storage: StorageEngine) -> GlobalCacheEngine:
        """An empty index of the CPU tier, and one of the SSD tier with what an earlier process has stored there."""
        num_blocks, digest_size = storage.cpu_pool.layout.num_blocks, self._hasher.digest_size
        if storage.ssd is None:
            return GlobalCacheEngine(self._cache_config, num_blocks, digest_size)
        cache = GlobalCacheEngine(self._cache_config, num_blocks, digest_size, storage.ssd.num_slots)
        found = storage.ssd.take_found()
        assert cache.ssd is not None
        blocks = found.blocks
        cache.ssd.engine.restore((blocks.hashes[rows], blocks.slots[rows]) for rows in found.leaf_paths())
        logger.info("SSD tier restored blocks=%d of=%d", len(blocks), storage.ssd.num_slots)
        return cache

    # -- life ------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the threads."""
        with self._lock:
            if not self._is_started and not self._is_shut_down:
                self._is_started = True
                self._tasks.start()

    @property
    def device_dir(self) -> Path:
        """The directory where this store's device workers find it."""
        return self._store_dir.path

    def is_ready(self) -> bool:
        """Whether every rank's device worker is connected."""
        return self._endpoint.is_ready

    def wait_ready(self, timeout: float = 20.0) -> bool:
        """Wait until every rank's device worker is connected; False if they are not within `timeout` seconds."""
        return self._endpoint.wait_ready(timeout)

    def shutdown(self) -> None:
        """Cancel what is not finished, let running copies end, and release everything."""
        with self._lock:
            if self._is_shut_down:
                return
            self._is_shut_down = True
        try:
            self._tasks.close(_SHUTDOWN_TIMEOUT_S)
        finally:
            self._resources.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- tasks -----------------------------------------------------------------------------------------------------
    def get_match(self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None) -> tuple[int, Mask]:
        """Find what can be loaded.

        Args:
            token_ids: the sequence from its beginning.
            token_mask: False for the leading tokens that are on the device already; None for none of them.
            namespace: who may share the blocks.

        Returns:
            The task, to be launched or cancelled, and the mask of the tokens it would load.

        Raises:
            InvalidRequestError: ids or a mask that make no sense.
        """
        task_id, plan, num_tokens, _ = self._plan("get", token_ids, token_mask, namespace)
        return task_id, self._mask(plan, num_tokens)

    def put_match(self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None) -> tuple[int, Mask]:
        """Find what is not stored yet.

        Args:
            token_ids: the sequence from its beginning.
            token_mask: True for the tokens that the caller can store; None for all.
            namespace: who may share the blocks.

        Returns:
            The task, to be launched or cancelled, and the mask of the tokens it would store: fewer than are missing
            when there is no room for all.

        Raises:
            InvalidRequestError: ids or a mask that make no sense.
        """
        task_id, plan, num_tokens, _ = self._plan("put", token_ids, token_mask, namespace)
        return task_id, self._mask(plan, num_tokens)

    def get_async(self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None) -> int:
        """Load what is stored of the tokens under the mask into their slots, `len(slot_mapping) == mask.sum()`.

        Raises:
            InvalidRequestError: ids, a mask or slots that make no sense.
        """
        return self._plan_and_launch("get", token_ids, slot_mapping, token_mask, namespace)

    def put_async(self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace = None) -> int:
        """Store what is missing of the tokens under the mask from their slots, `len(slot_mapping) == mask.sum()`.

        The slots must stay as they are until the task is answered.

        Raises:
            InvalidRequestError: ids, a mask or slots that make no sense.
        """
        return self._plan_and_launch("put", token_ids, slot_mapping, token_mask, namespace)

    def prefetch_async(self, token_ids: Any, namespace: Namespace = None) -> int:
        """Bring what SSD and remote store have of a sequence into host memory; the task runs at once.

        `get_match` knows the SSD tier, but does not wait for a remote store: what only that one has is found by a
        prefetch before it. The answer's `num_blocks` is how much of the sequence is in host memory in the end.

        Raises:
            InvalidRequestError: ids that make no sense.
        """
        return self._tasks.prefetch(self._sequence(as_array(token_ids, "token_ids"), namespace))

    def launch(self, task_ids: Sequence[int], slot_mappings: Sequence[Any]) -> None:
        """Run matched tasks. Each takes the slots of the tokens under its mask, as integers `[mask.sum()]`.

        Raises:
            InvalidRequestError: unknown or launched tasks, or slots that are not whole blocks.
        """
        if len(task_ids) != len(slot_mappings):
            raise InvalidRequestError(f"{len(task_ids)} tasks take as many slot mappings, not {len(slot_mappings)}")
        size = self._cache_config.tokens_per_block
        for task_id, slots in zip(task_ids, slot_mappings, strict=True):
            num_blocks = self._tasks.num_blocks(task_id)
            self._tasks.launch(task_id, slots_to_blocks(slots, num_blocks * size, size))

    def cancel(self, task_ids: Iterable[int]) -> None:
        """Cancel tasks; copies that run end first (`wait(..., completely=True)` tells when). Finished ones stay so."""
        self._tasks.cancel(task_ids)

    def wait(self, task_ids: Iterable[int], timeout: float = 20.0, completely: bool = False) -> dict[int, KVResponse]:
        """Wait until the caller's own data is safe: on the device (get), off the device (put).

        With `completely`, until every tier has it. After `timeout` seconds the tasks left are answered `timeout`.
        """
        return self._tasks.wait(task_ids, timeout, completely)

    def try_wait(self, task_ids: Iterable[int]) -> dict[int, KVResponse]:
        """Return the answers of those tasks that have one, without waiting."""
        return self._tasks.try_wait(task_ids)

    def drain(self, timeout: float = 20.0) -> bool:
        """Wait until nothing launched runs any more, copies between tiers included; False after `timeout` seconds."""
        return self._tasks.drain(timeout)

    # -- the store -------------------------------------------------------------------------------------------------
    def reset(self) -> bool:
        """Forget every block of every tier; False, changing nothing, while tasks are alive.

        Raises:
            TransferError: the disk refused; blocks may be found again after a restart.
        """
        if not self._tasks.reset():
            return False
        if self._ssd_worker is not None and self._is_started:
            self._ssd_worker.forget(None).result(_FORGET_TIMEOUT_S)
        return True

    def take_events(self) -> list[BlockStored | BlockRemoved]:
        """Return what the tiers stored and removed since the last call."""
        return self._tasks.take_events()

    def stats(self) -> CacheStats:
        """Return counters and sizes of the tiers."""
        return self._tasks.stats()

    def check_integrity(self) -> None:
        """Check every invariant of the index. Visits every block.

        Raises:
            CacheStateError: one is broken.
        """
        self._tasks.check_integrity()

    # -- inside ----------------------------------------------------------------------------------------------------
    def _plan(
        self, kind: str, token_ids: Any, token_mask: Any, namespace: Namespace
    ) -> tuple[int, CachePlan | None, int, int]:
        """Return (task, its plan or None, tokens given, first block under the mask)."""
        tokens = as_array(token_ids, "token_ids")
        size = self._cache_config.tokens_per_block
        first_block, end_block = block_run(token_mask, len(tokens), size)
        if not self.is_ready():
            first_block = 0
        sequence = self._sequence(tokens[: end_block * size], namespace)
        plan = self._tasks.plan_get if kind == "get" else self._tasks.plan_put
        task_id, planned = plan(sequence, first_block)
        return task_id, planned, len(tokens), first_block

    def _sequence(self, tokens: npt.NDArray[np.integer[Any]], namespace: Namespace) -> SequenceMeta:
        """Hash what is given; nothing as long as the layout of blocks is unknown, or no device would take them."""
        size = self._cache_config.tokens_per_block
        known = tokens if self.is_ready() else tokens[:0]
        return SequenceMeta.from_tokens(known, size, self._hasher, namespace, self._root())

    def _plan_and_launch(
        self, kind: str, token_ids: Any, slot_mapping: Any, token_mask: Any, namespace: Namespace
    ) -> int:
        slots = as_array(slot_mapping, "slot_mapping")
        mask = None if token_mask is None else as_array(token_mask, "token_mask")
        num_masked = len(as_array(token_ids, "token_ids")) if mask is None else int(np.count_nonzero(mask))
        if len(slots) != num_masked:
            raise InvalidRequestError(f"slot_mapping has {len(slots)} slots for {num_masked} tokens under the mask")
        task_id, plan, _, first_block = self._plan(kind, token_ids, mask, namespace)
        if plan is None:
            return task_id
        size = self._cache_config.tokens_per_block
        start = (plan.first_block - first_block) * size
        count = plan.num_blocks * size
        try:
            self._tasks.launch(task_id, slots_to_blocks(slots[start : start + count], count, size))
        except InvalidRequestError:
            self._tasks.cancel([task_id])
            raise
        return task_id

    def _mask(self, plan: CachePlan | None, num_tokens: int) -> Mask:
        mask = np.zeros(num_tokens, np.bool_)
        if plan is not None:
            size = self._cache_config.tokens_per_block
            mask[plan.first_block * size : (plan.first_block + plan.num_blocks) * size] = True
        return mask

    def _root(self) -> tuple[str, ...]:
        """What blocks of equal bytes have in common, before what the caller adds: the model and its layout."""
        model = self._model
        return (model.model_id, f"tp={model.tp_size};mla={model.use_mla};{self._endpoint.fingerprint}")

    def _remove_directory(self) -> None:
        self._store_dir.close()
        if self._own_root is not None:
            self._own_root.cleanup()
