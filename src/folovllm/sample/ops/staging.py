"""Host arrays to the device without waiting for it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.generic] | npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; on a CPU the same memory.

    Elsewhere by way of pinned memory and an asynchronous copy: a plain `.to` would wait until the device has done all
    work given to it before. torch keeps the pinned memory until the copy is done.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
