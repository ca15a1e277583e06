"""What moves between tiers: an op copies blocks along one path, a graph orders the ops of one request.

    get   REMOTE2H --+
          DISK2H   --+--> H2D
    put   D2H --> H2DISK --> H2REMOTE

The cache layer builds a graph before the engine has chosen device blocks: the device side of H2D and D2H ops is bound
later by `TransferOpGraph.bind_device_blocks`, and only then may the graph run.
"""

from __future__ import annotations

import enum
import itertools
import secrets
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flexkv.errors import InvalidRequestError, TransferError

BlockIds = npt.NDArray[np.int64]


class TransferType(enum.Enum):
    """The path of an op: source tier, then destination tier. D is the engine's device, H host memory."""

    H2D = "H2D"
    D2H = "D2H"
    DISK2H = "DISK2H"
    H2DISK = "H2DISK"
    REMOTE2H = "REMOTE2H"
    H2REMOTE = "H2REMOTE"
    VIRTUAL = "VIRTUAL"
    """Moves nothing: joins several predecessors into one."""


_op_ids = itertools.count(secrets.randbits(48))  # a device worker may answer the next store about an op of the last
_graph_ids = itertools.count(1)


def _unbound() -> BlockIds:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class BlockContent:
    """What the blocks of an op hold, for the tiers that outlive the process.

    Attributes:
        hashes: uint8 `[num_blocks, digest_size]`, contiguous.
        parents: uint8 `[num_blocks, digest_size]`, the hash of the block before; all zero for the first of a sequence.
        namespace: who may share them; empty for everybody.
    """

    hashes: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    namespace: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.hashes.dtype == self.parents.dtype == np.uint8
        assert self.hashes.ndim == 2
        assert self.hashes.shape == self.parents.shape

    @classmethod
    def of_run(
        cls, block_hashes: npt.NDArray[np.uint8], first_block: int, num_blocks: int, namespace: tuple[str, ...] = ()
    ) -> BlockContent:
        """Describe blocks `[first_block, first_block + num_blocks)` of a sequence with these digests."""
        before = np.zeros_like(block_hashes[:1]) if first_block == 0 else block_hashes[first_block - 1 : first_block]
        hashes = block_hashes[first_block : first_block + num_blocks]
        return cls(hashes, np.concatenate([before, hashes])[: len(hashes)], namespace)

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass(slots=True, eq=False)
class TransferOp:
    """One copy of `len(src_block_ids)` blocks; block i of the source goes to block i of the destination.

    Attributes:
        graph_id: the graph it belongs to; filled by `TransferOpGraph.add_op`.
        src_block_ids: int64 `[num_blocks]`, ids in the source tier; empty in D2H until bound, and in REMOTE2H.
        dst_block_ids: int64 `[num_blocks]`, ids in the destination tier; empty in H2D until bound, and in H2REMOTE.
        layer_id: the first layer to copy.
        num_layers: how many layers, or None for all from `layer_id` on.
        content: what the blocks hold; required by ops from and to SSD and remote, block by block as the ids.
        waits_for: ids of ops of other graphs, submitted before this one's, that must succeed before this one starts.
        predecessors: ids of ops of the same graph that must end before this one starts.
        successors: the same edges, seen from the other side.
        op_id: unique in the process.
    """

    type: TransferType
    src_block_ids: BlockIds = field(default_factory=_unbound)
    dst_block_ids: BlockIds = field(default_factory=_unbound)
    layer_id: int = 0
    num_layers: int | None = None
    content: BlockContent | None = None
    waits_for: frozenset[int] = frozenset()
    graph_id: int = 0
    predecessors: set[int] = field(default_factory=set)
    successors: set[int] = field(default_factory=set)
    op_id: int = field(default_factory=lambda: next(_op_ids))

    @property
    def num_blocks(self) -> int:
        """Number of blocks it copies, known before the device side is bound."""
        return max(len(self.src_block_ids), len(self.dst_block_ids))

    @property
    def is_bound(self) -> bool:
        """Whether both sides are known; the remote side is known by its content alone."""
        if self.content is not None and self.type in (TransferType.REMOTE2H, TransferType.H2REMOTE):
            return len(self.content) == self.num_blocks
        return len(self.src_block_ids) == len(self.dst_block_ids)


_DEVICE_SIDE: Final = {TransferType.H2D: "dst_block_ids", TransferType.D2H: "src_block_ids"}


class TransferOpGraph:
    """The ops of one request and their order. Not thread-safe: one thread at a time owns a graph.

    Attributes:
        graph_id: unique in the process.
        ops: every op by id, in the order they were added; finished ones stay.
    """

    def __init__(self, graph_id: int | None = None) -> None:
        """Make an empty graph, with a fresh id unless one is given (a graph received from another process)."""
        self.graph_id: Final = next(_graph_ids) if graph_id is None else graph_id
        self.ops: Final[dict[int, TransferOp]] = {}
        self._finished: set[int] = set()

    def add_op(self, op: TransferOp) -> TransferOp:
        """Take `op` into the graph and return it.

        Raises:
            TransferError: an op of that id is in the graph already.
        """
        if op.op_id in self.ops:
            raise TransferError(f"op {op.op_id} is in graph {self.graph_id} already")
        op.graph_id = self.graph_id
        self.ops[op.op_id] = op
        return op

    def add_dependency(self, successor: int, predecessor: int) -> None:
        """Let op `successor` start only after op `predecessor` ended.

        Raises:
            TransferError: one of them is not in the graph, or the edge would close a circle.
        """
        for op_id in (successor, predecessor):
            self._op(op_id)
        if self._reaches(successor, predecessor):
            raise TransferError(f"op {successor} already comes before op {predecessor}: they would wait for each other")
        self.ops[successor].predecessors.add(predecessor)
        self.ops[predecessor].successors.add(successor)

    def ready_ops(self) -> list[TransferOp]:
        """Return the ops that are not finished and whose predecessors all are, in the order they were added."""
        return [op for op in self.ops.values() if op.op_id not in self._finished and op.predecessors <= self._finished]

    def finish_op(self, op_id: int) -> list[TransferOp]:
        """Note that an op ended, and return the ops which that made ready.

        Raises:
            TransferError: no such op, or it was finished before.
        """
        op = self._op(op_id)
        if op_id in self._finished:
            raise TransferError(f"op {op_id} of graph {self.graph_id} was finished before")
        self._finished.add(op_id)
        successors = (self.ops[successor] for successor in sorted(op.successors))
        return [successor for successor in successors if successor.predecessors <= self._finished]

    @property
    def is_finished(self) -> bool:
        """Whether every op has ended."""
        return len(self._finished) == len(self.ops)

    @property
    def num_device_blocks(self) -> int:
        """Number of device block ids that `bind_device_blocks` takes."""
        return sum(op.num_blocks for op in self.ops.values() if op.type in _DEVICE_SIDE)

    @property
    def is_bound(self) -> bool:
        """Whether both sides of every op are known, so that the graph may run."""
        return all(op.is_bound for op in self.ops.values())

    def bind_device_blocks(self, block_ids: npt.NDArray[np.integer[Any]]) -> None:
        """Fill the device side of every H2D and D2H op, in the order they were added, from integers `[num_blocks]`.

        Raises:
            InvalidRequestError: not as many ids as the ops copy blocks, or ids that are not non-negative integers.
        """
        ids = np.asarray(block_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) != self.num_device_blocks:
            raise InvalidRequestError(
                f"graph {self.graph_id} takes {self.num_device_blocks} integer device block ids, "
                f"not {ids.dtype} {list(ids.shape)}"
            )
        if len(ids) and int(ids.min()) < 0:
            raise InvalidRequestError(f"device block ids are at least 0, one is {int(ids.min())}")
        start = 0
        for op in self.ops.values():
            if side := _DEVICE_SIDE.get(op.type):
                setattr(op, side, ids[start : start + op.num_blocks].astype(np.int64))
                start += op.num_blocks

    def _op(self, op_id: int) -> TransferOp:
        try:
            return self.ops[op_id]
        except KeyError:
            raise TransferError(f"op {op_id} is not in graph {self.graph_id}") from None

    def _reaches(self, start: int, target: int) -> bool:
        seen: set[int] = set()
        todo = [start]
        while todo:
            op_id = todo.pop()
            if op_id == target:
                return True
            if op_id not in seen:
                seen.add(op_id)
                todo.extend(self.ops[op_id].successors)
        return False
