"""Copies between host and device that nobody waits for until they are needed; on a CPU there are none.

host    fill inputs, launch | ................ | wait for the tokens, take them
device                      copy inputs, forward, sample, copy tokens
"""

import numpy as np
import numpy.typing as npt
import torch


class CopyFence:
    """Keeps the pinned input buffers from being written to while the copies of the step before still read them.

    A step that samples has waited for its copies; one of partial prefills alone has not.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = _make_event(device)

    def wait(self) -> None:
        """Before the buffers are written to."""
        if self._event is not None:
            self._event.synchronize()

    def copies_given(self) -> None:
        """All copies of the step are on the device's stream."""
        if self._event is not None:
            self._event.record()


class TokenReadback:
    """The sampled tokens' way to the host: the only thing of a step that the host waits for."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Room for `capacity` tokens."""
        self._event = _make_event(device)
        self._host = torch.empty(capacity, dtype=torch.int64, pin_memory=True) if self._event is not None else None
        self._tokens: torch.Tensor | None = None

    def start(self, tokens: torch.Tensor) -> None:
        """Copy `[n]` int64 tokens behind all work that was given to the device."""
        if self._host is None or self._event is None:
            self._tokens = tokens
            return
        self._tokens = self._host[: len(tokens)]
        self._tokens.copy_(tokens, non_blocking=True)
        self._event.record()

    def wait(self) -> npt.NDArray[np.int64]:
        """The tokens of the last `start`, once they are here; overwritten by the next."""
        assert self._tokens is not None, "no tokens are on their way"
        if self._event is not None:
            self._event.synchronize()
        tokens, self._tokens = self._tokens, None
        array: npt.NDArray[np.int64] = tokens.numpy()
        return array


def _make_event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
