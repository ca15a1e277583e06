"""Graphs in, ready ops out. A structure of one thread: no locks, no clocks, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from flexkv.common.transfer import TransferOp, TransferOpGraph, TransferType
from flexkv.errors import TransferError
from flexkv.transfer.worker import OpResult

_NUM_FAILURES_KEPT: Final = 65_536


class TransferScheduler:
    """Orders the ops of the graphs it was given: an op is ready when all its predecessors have succeeded.

    So must the ops of other graphs that it waits for, which are added before it. Those that ended before it came are
    taken to have succeeded unless they are among the last failures: who adds a graph knows of older ones.

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
        self._parked: dict[int, list[TransferOp]] = {}  # by an op of another graph that they wait for
        self._failures: dict[int, None] = {}  # the last ops that failed, oldest first
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
        if graph_id not in self._graphs:
            return
        self._given_up.add(graph_id)
        for op_id, ops in list(self._parked.items()):
            self._new.extend(op for op in ops if op.graph_id == graph_id)
            self._parked[op_id] = [op for op in ops if op.graph_id != graph_id]

    def schedule(self, finished: Iterable[OpResult]) -> tuple[list[int], list[TransferOp]]:
        """Take results of ops handed out before; return the graphs that are done now and the ops to run next."""
        touched: dict[int, None] = {}
        candidates, self._new = self._new, []
        for result in finished:
            graph_id = self._graph_of_op[result.op_id]
            touched[graph_id] = None
            candidates.extend(self._end(result.op_id, result.is_complete))
        next_ops: list[TransferOp] = []
        while candidates:
            op = candidates.pop(0)
            touched[op.graph_id] = None
            if self._is_vain(op):
                self._abandoned.append(op)
                candidates.extend(self._end(op.op_id, False))
            elif awaited := next((op_id for op_id in op.waits_for if op_id in self._graph_of_op), None):
                self._parked.setdefault(awaited, []).append(op)
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

    def _is_vain(self, op: TransferOp) -> bool:
        return (
            op.graph_id in self._given_up
            or not op.predecessors.isdisjoint(self._failed[op.graph_id])
            or not op.waits_for.isdisjoint(self._failures)
        )

    def _end(self, op_id: int, ok: bool) -> list[TransferOp]:
        """Note how an op ended; return the ops that are ready now, be it in vain."""
        graph_id = self._graph_of_op.pop(op_id)
        if not ok:
            self._failed[graph_id].add(op_id)
            self._failures[op_id] = None
            if len(self._failures) > _NUM_FAILURES_KEPT:
                del self._failures[next(iter(self._failures))]
        return [*self._graphs[graph_id].finish_op(op_id), *self._parked.pop(op_id, ())]

    def _forget(self, graph_id: int) -> None:
        del self._graphs[graph_id]
        del self._failed[graph_id]
        self._given_up.discard(graph_id)
