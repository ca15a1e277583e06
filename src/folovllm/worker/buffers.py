"""Staging of host arrays to the device. Mirrors vllm/v1/utils.py CpuGpuBuffer."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class StagingBuffer:
    """A host array of fixed capacity and its copy on the device, allocated once.

    On a CPU both are the same memory. On CUDA the host side is pinned and the copy asynchronous: the host may write
    again only when the copies are done (`CopyFence`).
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._host = torch.zeros(capacity, dtype=dtype, pin_memory=not self._on_cpu)
        self._device = self._host if self._on_cpu else torch.zeros(capacity, dtype=dtype, device=device)
        self.array: npt.NDArray[Any] = self._host.numpy()
        """The host's side, to be written to before `send`."""
        # Handed out last: the next step has mostly as many.
        self._view = self._device[:0]

    def fill(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        """Copy `values` over the start of the buffer; returns them on the device in their own shape."""
        self.array[: values.size] = values.reshape(-1)
        return self.send(*values.shape)

    def send(self, *shape: int) -> torch.Tensor:
        """The start of the buffer, on the device, in this shape."""
        if self._view.shape != shape:
            size = int(np.prod(shape))
            self._view = self._device[:size].view(shape)
        if not self._on_cpu:
            size = self._view.numel()
            self._device[:size].copy_(self._host[:size], non_blocking=True)
        return self._view
