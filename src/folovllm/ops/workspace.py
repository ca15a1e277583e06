"""Buffers that live as long as the model, so that a step allocates and faults in no memory."""

import torch

_LEAST_ROWS = 64


class Workspace:
    """Buffers by name and width, each grown to the most rows it was ever asked for. Used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        # The views handed out last: decode steps ask for the same ones again and again.
        self._views: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        self.generation = 0
        """How often a buffer came or grew: while it stays the same, so do all addresses."""

    def rows(self, name: str, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """`[num_rows, width]`, contiguous, with any content; the same memory for the same name, width and dtype."""
        key = (name, width, dtype)
        view = self._views.get(key)
        if view is None or view.shape[0] != num_rows:
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape[0] < num_rows:
                size = capacity(num_rows), width
                buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=self._device)
                self.generation += 1
            view = self._views[key] = buffer[:num_rows]
        return view

    def buffer_of(self, view: torch.Tensor) -> torch.Tensor | None:
        """The whole buffer that begins where `view` does, if it is one of these."""
        address = view.data_ptr()
        return next((buffer for buffer in self._buffers.values() if buffer.data_ptr() == address), None)


def capacity(num_rows: int) -> int:
    """Rows of a buffer that was asked for `num_rows`, at least.

    They grow by powers of two, so that buffers seldom move; rows that nobody writes to take no memory.
    """
    return max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length())
