"""Which copies a request takes, as a graph of ops.

get    CPU --H2D--> device
put    device --D2H--> CPU

The device side is bound once the engine has chosen its blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from flexkv.common.transfer import BlockIds, TransferOp, TransferOpGraph, TransferType


class DeviceTransfer(NamedTuple):
    """A graph, and the op of it that touches the caller's own blocks."""

    graph: TransferOpGraph
    device_op: TransferOp


def get_from_cpu(cpu_block_ids: BlockIds) -> DeviceTransfer:
    """Copy blocks of the CPU tier to the device."""
    graph = TransferOpGraph()
    return DeviceTransfer(graph, graph.add_op(TransferOp(TransferType.H2D, src_block_ids=cpu_block_ids)))


def put_to_cpu(cpu_block_ids: BlockIds) -> DeviceTransfer:
    """Copy blocks of the device to the CPU tier."""
    graph = TransferOpGraph()
    return DeviceTransfer(graph, graph.add_op(TransferOp(TransferType.D2H, dst_block_ids=cpu_block_ids)))
