"""Staging of host arrays to the device. Mirrors vllm/v1/utils.py CpuGpuBuffer."""

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
        self.array: npt.NDArray[np.generic] = self._host.numpy()
        # Handed out last: the next step has mostly as many.
        self._view = self._device[:0]

    def fill(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        """Copy `values` over the start of the buffer; returns them on the device in their own shape."""
        size = values.size
        self.array[:size] = values.reshape(-1)
        if not self._on_cpu:
            self._device[:size].copy_(self._host[:size], non_blocking=True)
        if self._view.shape != values.shape:
            self._view = self._device[:size].view(values.shape)
        return self._view
