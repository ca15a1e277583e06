"""The ranks of one engine as a group of torch.distributed: gloo on CPUs, NCCL on GPUs.

Mirrors vllm/distributed/device_communicators. The ranks are processes of one machine; they meet through a file in a
private directory, and gloo is kept to the loopback interface.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from folovllm.model_executor.parallel import TensorParallel

_TIMEOUT_S = 120
"""Longest a rank waits for the others inside one operation. They compute the same layers at the same time."""


class ProcessGroup:
    """This rank's side of the group; a `Communicator`. One per process, used by the thread that runs the model."""

    def __init__(self, rendezvous: Path, rank: int, size: int, device: torch.device) -> None:
        """Join: blocks until all ranks have.

        Raises:
            RuntimeError: not all ranks joined in time.
        """
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._size = size
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=FileStore(str(rendezvous), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' columns side by side."""
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=-1)

    def close(self) -> None:
        """Leave; idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(rendezvous: Path, rank: int, size: int, device: torch.device) -> tuple[TensorParallel, ProcessGroup]:
    """Become rank `rank` of `size`.

    Raises:
        RuntimeError: not all ranks joined in time.
    """
    group = ProcessGroup(rendezvous, rank, size, device)
    return TensorParallel(rank, size, group), group
