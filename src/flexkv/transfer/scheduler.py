"""Graphs in, ready ops out. A structure of one thread: no locks, no clocks, no I/O."""

from __future__ import annotations

from collections.abc import Iterable

from flexkv.common.transfer import TransferOp, TransferOpGraph, TransferType
from flexkv.errors import TransferError
from flexkv.transfer.worker import OpResult


class TransferScheduler:
    """Orders the ops of the graphs it was given: an op is ready when all its predecessors have succeeded.

    Ops below one that failed, be it for some of its blocks only, and those of a graph given up that were not handed out
    yet, never run: they are abandoned.
    A graph is done when every op of it has ended, one way or the other.
    """

    def __init__(self) -> None:
        """Make a scheduler without graphs."""
        self._graphs: dict[int, TransferOpGraph] = {}
        self._graph_of_op: dict[int, int] = {}
        self._failed: dict[int, set[int]] = {}  # graph -> its ops that failed or were abandoned
        self._given_up: set[int] = set()  # graphs that hand out nothing more
        self._new: list[TransferOp] = []  # ready since `add`
        self._abandoned: list[TransferOp] = []

    def add(self, graph: TransferOpGraph) -> None:
        """Take a bound graph; its first ops come with the next `schedule`.

        Raises:
            TransferError: it is not bound, has no op, or was added before.
        """
        if not graph.ops or not graph.is_bound:
            raise TransferError(f"graph {graph.graph_id} cannot run: it has no ops, or its device blocks are unknown")
        if graph.graph_id in self._graphs:
            raise TransferError(f"graph {graph.graph_id} was added before")
        self._graphs[graph.graph_id] = graph
        self._failed[graph.graph_id] = set()
        self._graph_of_op.update((op_id, graph.graph_id) for op_id in graph.ops)
        self._new.extend(graph.ready_ops())

    def give_up(self, graph_id: int) -> None:
        """Hand out no more ops of a graph. Unknown graphs (done already) are ignored."""
        if graph_id in self._graphs:
            self._given_up.add(graph_id)

    def schedule(self, finished: Iterable[OpResult]) -> tuple[list[int], list[TransferOp]]:
        """Take results of ops handed out before; return the graphs that are done now and the ops to run next."""
        touched: dict[int, None] = dict.fromkeys(op.graph_id for op in self._new)
        candidates, self._new = self._new, []
        for result in finished:
            graph_id = self._graph_of_op[result.op_id]
            touched[graph_id] = None
            candidates.extend(self._end(result.op_id, result.is_complete))
        next_ops: list[TransferOp] = []
        while candidates:
            op = candidates.pop(0)
            if op.graph_id in self._given_up or op.predecessors & self._failed[op.graph_id]:
                self._abandoned.append(op)
                candidates.extend(self._end(op.op_id, False))
            elif op.type is TransferType.VIRTUAL:
                candidates.extend(self._end(op.op_id, True))
            else:
                next_ops.append(op)
        done = [graph_id for graph_id in touched if self._graphs[graph_id].is_finished]
        for graph_id in done:
            self._forget(graph_id)
        return done, next_ops

    def take_abandoned(self) -> list[TransferOp]:
        """Return the ops that ended without running since the last call."""
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    @property
    def num_graphs(self) -> int:
        """Graphs that are not done."""
        return len(self._graphs)

    def _end(self, op_id: int, ok: bool) -> list[TransferOp]:
        graph_id = self._graph_of_op[op_id]
        if not ok:
            self._failed[graph_id].add(op_id)
        return self._graphs[graph_id].finish_op(op_id)

    def _forget(self, graph_id: int) -> None:
        graph = self._graphs.pop(graph_id)
        del self._failed[graph_id]
        self._given_up.discard(graph_id)
        for op_id in graph.ops:
            del self._graph_of_op[op_id]
