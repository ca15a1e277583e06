"""Which copies a request takes, as graphs of ops.

    load   SSD --DISK2H--> CPU, remote --REMOTE2H--> CPU        begins when it is planned: it needs no device block
    get    CPU --H2D--> device                                  what is in the CPU tier
           CPU --H2D--> device, after the loads it waits for    what is on its way there
    put    device --D2H--> CPU --H2DISK--> SSD
                               --H2REMOTE--> remote

The device side is bound once the engine has chosen its blocks.
"""

from __future__ import annotations

from flexkv.common.transfer import BlockContent, BlockIds, TransferOp, TransferOpGraph, TransferType


def load_from_ssd(slots: BlockIds, cpu_block_ids: BlockIds, content: BlockContent) -> TransferOpGraph:
    """Copy blocks of the SSD tier to the CPU tier."""
    graph = TransferOpGraph()
    graph.add_op(TransferOp(TransferType.DISK2H, src_block_ids=slots, dst_block_ids=cpu_block_ids, content=content))
    return graph


def load_from_remote(cpu_block_ids: BlockIds, content: BlockContent) -> TransferOpGraph:
    """Copy blocks of the remote store to the CPU tier."""
    graph = TransferOpGraph()
    graph.add_op(TransferOp(TransferType.REMOTE2H, dst_block_ids=cpu_block_ids, content=content))
    return graph


def add_get(graph: TransferOpGraph, cpu_block_ids: BlockIds, loads: frozenset[int] = frozenset()) -> TransferOp:
    """Copy blocks of the CPU tier to the device, once these loads have brought them."""
    return graph.add_op(TransferOp(TransferType.H2D, src_block_ids=cpu_block_ids, waits_for=loads))


def add_put(graph: TransferOpGraph, cpu_block_ids: BlockIds) -> TransferOp:
    """Copy blocks of the device to the CPU tier."""
    return graph.add_op(TransferOp(TransferType.D2H, dst_block_ids=cpu_block_ids))


def add_store_on_ssd(
    graph: TransferOpGraph, cpu_block_ids: BlockIds, slots: BlockIds, content: BlockContent, after: TransferOp | None
) -> TransferOp:
    """Copy blocks of the CPU tier to the SSD tier, after the op that fills some of them."""
    op = TransferOp(TransferType.H2DISK, src_block_ids=cpu_block_ids, dst_block_ids=slots, content=content)
    graph.add_op(op)
    if after is not None:
        graph.add_dependency(op.op_id, after.op_id)
    return op


def add_store_remotely(
    graph: TransferOpGraph, cpu_block_ids: BlockIds, content: BlockContent, after: TransferOp
) -> TransferOp:
    """Copy blocks of the CPU tier to the remote store, after the op that fills them."""
    op = graph.add_op(TransferOp(TransferType.H2REMOTE, src_block_ids=cpu_block_ids, content=content))
    graph.add_dependency(op.op_id, after.op_id)
    return op
