"""Tensor parallelism: which share of a layer this rank has, and how shares become a whole.

Mirrors vllm/distributed/parallel_state.py. A column-parallel layer holds some of the output columns, a row-parallel one
some of the input columns, so that a pair of them needs a single sum over the ranks:

    x --[ columns: rank's heads ]--> attention --[ rows: the same heads ]--> partial sums --all_reduce--> y
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from folovllm.errors import ConfigError


class Communicator(Protocol):
    """Sums over the ranks."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by the sum of all ranks' tensors, in place."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' `[num_rows, width]` side by side: `[num_rows, size * width]`."""
        ...


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place in its group."""

    rank: int = 0
    size: int = 1
    communicator: Communicator | None = None
    """None in a group of one."""

    def share(self, name: str, size: int) -> slice:
        """This rank's part of `size` things.

        Raises:
            ConfigError: they cannot be shared out evenly.
        """
        if size % self.size:
            raise ConfigError(
                f"tensor_parallel_size={self.size} does not divide {name}={size}; choose one that divides it"
            )
        each = size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.communicator is not None:
            self.communicator.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' columns side by side."""
        return tensor if self.communicator is None else self.communicator.all_gather(tensor)


SINGLE = TensorParallel()
"""The group of one."""
