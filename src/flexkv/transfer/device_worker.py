"""The thread beside an engine's device memory that copies blocks between it and the pool."""

from __future__ import annotations

import logging
import threading
import time

from flexkv.errors import TransferError
from flexkv.transfer.device_copier import DeviceCopier
from flexkv.transfer.device_tasks import CopyJob, DeviceTasks

logger = logging.getLogger(__name__)


class CopyStats:
    """What a device worker has copied, per direction; counters only grow. Written by its thread, read by any."""

    def __init__(self) -> None:
        """Start at zero."""
        self.num_loads = 0
        self.loaded_blocks = 0
        self.load_seconds = 0.0
        self.num_stores = 0
        self.stored_blocks = 0
        self.store_seconds = 0.0
        self.num_failed = 0

    def count(self, job: CopyJob, seconds: float, ok: bool) -> None:
        """Add one op."""
        if not ok:
            self.num_failed += 1
        elif job.to_device:
            self.num_loads += 1
            self.loaded_blocks += len(job.device_blocks)
            self.load_seconds += seconds
        else:
            self.num_stores += 1
            self.stored_blocks += len(job.device_blocks)
            self.store_seconds += seconds


class DeviceWorker:
    """Runs the runnable ops of `tasks`, one after another, on its own thread."""

    def __init__(self, tasks: DeviceTasks, copier: DeviceCopier, num_layers: int) -> None:
        """Take what to run and how to copy; `num_layers` are registered with the copier."""
        self._tasks = tasks
        self._copier = copier
        self._num_layers = num_layers
        self._thread = threading.Thread(target=self._run, name="flexkv-device-worker", daemon=True)
        self.stats = CopyStats()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def use(self, copier: DeviceCopier) -> None:
        """Copy later ops with another copier: the pool has been replaced. One that is running ends with the old."""
        self._copier = copier

    def wait_for_engine(self) -> None:
        """Called by the engine's thread: copies that have not begun come after what it has queued on its device."""
        self._copier.wait_for_engine()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end, after `tasks.close()`: the op it runs ends first.

        Raises:
            TransferError: it is still copying.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TransferError(f"a copy is still running after {timeout_s} s")

    def _run(self) -> None:
        try:
            self._copy_until_closed()
        except Exception:  # the thread's boundary: nobody copies any more, so every op is refused
            logger.exception("the device worker failed; every load is a miss from now on")
            self._tasks.close()

    def _copy_until_closed(self) -> None:
        while (job := self._tasks.take()) is not None:
            begin = time.perf_counter()
            error = ""
            try:
                self._copy(job)
            except Exception as failure:  # whatever a device says: the op failed, the worker goes on
                logger.exception("copy failed op_id=%d task_id=%d", job.op_id, job.task_id)
                error = f"{type(failure).__name__}: {failure}"
            self.stats.count(job, time.perf_counter() - begin, not error)
            self._tasks.finish(job, error)

    def _copy(self, job: CopyJob) -> None:
        num_layers = self._num_layers - job.first_layer if job.num_layers is None else job.num_layers
        self._copier.copy(
            to_device=job.to_device,
            device_blocks=job.device_blocks,
            pool_blocks=job.pool_blocks,
            first_layer=job.first_layer,
            num_layers=num_layers,
        )
