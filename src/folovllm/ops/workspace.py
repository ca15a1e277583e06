"""Buffers that live as long as the model, so that a step allocates and faults in no memory."""

import torch


class Workspace:
    """Buffers by name and width, each grown to the most rows it was ever asked for. Used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        # The views handed out last: decode steps ask for the same ones again and again.
        self._views: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def rows(self, name: str, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """`[num_rows, width]`, contiguous, with any content; the same memory for the same name, width and dtype."""
        key = (name, width, dtype)
        view = self._views.get(key)
        if view is None or len(view) != num_rows:
            buffer = self._buffers.get(key)
            if buffer is None or len(buffer) < num_rows:
                buffer = self._buffers[key] = torch.empty(num_rows, width, dtype=dtype, device=self._device)
            view = self._views[key] = buffer[:num_rows]
        return view
