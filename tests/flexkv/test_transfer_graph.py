from __future__ import annotations

import numpy as np
import pytest

from flexkv.common.transfer import TransferOp, TransferOpGraph, TransferType
from flexkv.errors import InvalidRequestError, TransferError


def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def load_graph() -> tuple[TransferOpGraph, TransferOp, TransferOp, TransferOp]:
    """A disk read and a remote read, then one copy to the device."""
    graph = TransferOpGraph()
    disk = graph.add_op(TransferOp(TransferType.DISK2H, ids(7), ids(1)))
    remote = graph.add_op(TransferOp(TransferType.REMOTE2H, ids(9), ids(2)))
    load = graph.add_op(TransferOp(TransferType.H2D, src_block_ids=ids(1, 2)))
    graph.add_dependency(load.op_id, disk.op_id)
    graph.add_dependency(load.op_id, remote.op_id)
    return graph, disk, remote, load


def test_an_op_is_ready_once_all_its_predecessors_ended() -> None:
    graph, disk, remote, load = load_graph()
    assert graph.ready_ops() == [disk, remote]
    assert graph.finish_op(remote.op_id) == []
    assert graph.ready_ops() == [disk]
    assert graph.finish_op(disk.op_id) == [load]
    assert not graph.is_finished
    assert graph.finish_op(load.op_id) == []
    assert graph.is_finished
    assert graph.ready_ops() == []


def test_ids_are_unique_and_ops_know_their_graph() -> None:
    first, second = load_graph(), load_graph()
    assert first[0].graph_id != second[0].graph_id
    assert first[0].ops.keys().isdisjoint(second[0].ops.keys())
    assert all(op.graph_id == first[0].graph_id for op in first[0].ops.values())


def test_device_blocks_are_bound_in_order() -> None:
    graph, disk, _, load = load_graph()
    tail = graph.add_op(TransferOp(TransferType.H2D, src_block_ids=ids(3)))
    store = graph.add_op(TransferOp(TransferType.D2H, dst_block_ids=ids(4, 5)))
    assert graph.num_device_blocks == 5
    assert not graph.is_bound
    graph.bind_device_blocks(np.array([10, 11, 12, 13, 14], np.int32))
    assert graph.is_bound
    assert load.dst_block_ids.tolist() == [10, 11]
    assert tail.dst_block_ids.tolist() == [12]
    assert store.src_block_ids.tolist() == [13, 14]
    assert disk.dst_block_ids.tolist() == [1]
    assert {op.dst_block_ids.dtype for op in graph.ops.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("bad", [np.array([1]), np.array([1, 2, 3]), np.array([1.0, 2.0]), np.array([[1, 2]])])
def test_wrong_device_blocks_are_refused(bad: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    graph = load_graph()[0]
    with pytest.raises(InvalidRequestError, match="takes 2 integer device block ids"):
        graph.bind_device_blocks(bad)  # type: ignore[arg-type]
    assert not graph.is_bound


def test_negative_device_blocks_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="-1"):
        load_graph()[0].bind_device_blocks(np.array([0, -1]))


def test_circles_and_strangers_are_refused() -> None:
    graph, disk, _, load = load_graph()
    with pytest.raises(TransferError, match="wait for each other"):
        graph.add_dependency(disk.op_id, load.op_id)
    with pytest.raises(TransferError, match="wait for each other"):
        graph.add_dependency(disk.op_id, disk.op_id)
    with pytest.raises(TransferError, match="not in graph"):
        graph.add_dependency(load.op_id, 0)
    with pytest.raises(TransferError, match="already"):
        graph.add_op(disk)
    graph.finish_op(disk.op_id)
    with pytest.raises(TransferError, match="finished before"):
        graph.finish_op(disk.op_id)
