"""Where the transfer engine runs, behind one contract. Here: as a thread of the manager's own process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from flexkv.common.transfer import TransferOpGraph, TransferType
from flexkv.transfer.transfer_engine import TransferEngine, TransferListener
from flexkv.transfer.worker import TransferWorker


class TransferManager(ABC):
    """Hosts a transfer engine. `submit` and `cancel` are thread-safe and never block; every graph submitted ends."""

    @abstractmethod
    def start(self, listener: TransferListener) -> None:
        """Begin to run graphs; ends go to `listener`."""

    @abstractmethod
    def submit(self, graph: TransferOpGraph, task_id: int) -> None:
        """Run a bound graph.

        Raises:
            TransferError: the engine has stopped.
        """

    @abstractmethod
    def cancel(self, graph_id: int) -> None:
        """Run no further op of a graph; it still ends."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether graphs are being run."""

    @abstractmethod
    def close(self) -> None:
        """Stop; graphs that are left end as failed. Idempotent."""


class ThreadTransferManager(TransferManager):
    """Hosts the transfer engine as one thread of this process."""

    def __init__(self, workers: Mapping[TransferType, TransferWorker], op_timeout_s: float) -> None:
        """Take the workers; see `TransferEngine`."""
        self._workers = workers
        self._op_timeout_s = op_timeout_s
        self._engine: TransferEngine | None = None

    def start(self, listener: TransferListener) -> None:
        """Start the thread and its workers."""
        assert self._engine is None, "started twice"
        self._engine = TransferEngine(self._workers, listener, self._op_timeout_s)
        self._engine.start()

    def submit(self, graph: TransferOpGraph, task_id: int) -> None:
        """Run a bound graph."""
        assert self._engine is not None, "not started"
        self._engine.submit(graph, task_id)

    def cancel(self, graph_id: int) -> None:
        """Run no further op of a graph; it still ends."""
        assert self._engine is not None, "not started"
        self._engine.cancel(graph_id)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._engine is not None and self._engine.is_alive

    def close(self) -> None:
        """Stop the thread and its workers; graphs that are left end as failed. Idempotent."""
        if self._engine is not None:
            self._engine.close()
