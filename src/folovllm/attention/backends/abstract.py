"""The contract of an attention backend. Mirrors vllm/v1/attention/backend.py."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from folovllm.errors import ConfigError
from folovllm.ops.workspace import Workspace


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step live. Prefill chunks and decodes share the batch; nothing is padded.

    Request i owns query rows `[query_start_loc[i], query_start_loc[i + 1])`; they are the last ones of its
    `seq_lens[i]` tokens, whose KV is in the blocks `block_tables[i]`.
    """

    query_start_loc: torch.Tensor
    """`[num_reqs + 1]` int32."""
    seq_lens: torch.Tensor
    """`[num_reqs]` int32: tokens with KV once this step has written its own."""
    block_tables: torch.Tensor
    """`[num_reqs, max_blocks]` int32, padded with the null block."""
    slot_mapping: torch.Tensor
    """`[num_tokens]` int64: the slot of each query row."""
    slot_blocks: torch.Tensor
    """`slot_mapping // block_size`, computed once per step."""
    slot_offsets: torch.Tensor
    """`slot_mapping % block_size`."""
    query_start_loc_cpu: npt.NDArray[np.int32]
    """The same numbers on the host, so that a backend can plan without waiting for the device."""
    seq_lens_cpu: npt.NDArray[np.int32]
    backend_plan: Any = None
    """What the backend's `plan` returned for this step."""


class AttentionBackend(ABC):
    """Computes causal attention of a mixed batch over the paged cache. One instance serves all layers of a model."""

    name: ClassVar[str]
    workspace: Workspace | None = None
    """Where native kernels put their results; None: others compute."""
    plans_by_length: ClassVar[bool] = True
    """Whether `plan` depends on more than the addresses and shapes of the step's tensors."""
    is_batch_invariant: ClassVar[bool] = False
    """Whether `batch_invariant` can be asked for."""
    supports_cuda_graphs: ClassVar[bool] = False
    """Whether `forward` of decodes can be captured: it launches the same work whatever the lengths, waits for nothing,
    and a request of length 0 reads no block."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_size: int, block_size: int, batch_invariant: bool = False
    ) -> None:
        """`batch_invariant`: a row's bits depend on no other row, nor on the chunk it is computed in.

        Raises:
            ConfigError: this backend cannot promise that.
        """
        if batch_invariant and not self.is_batch_invariant:
            raise ConfigError(
                f"attention backend {self.name!r} has no batch-invariant arithmetic; leave batch_invariant off, "
                "or run on a CPU with attention_backend 'paged'"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.block_size = block_size
        self.scale = float(head_size**-0.5)
        self.batch_invariant = batch_invariant

    @classmethod
    @abstractmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        """Whether this backend can run here; asked by the automatic choice and before a forced one is used."""

    @classmethod
    def missing_package(cls) -> str | None:
        """The package that must be installed first; None when nothing is missing."""
        return None

    def plan(self, metadata: AttentionMetadata) -> Any:
        """Prepare what all layers of the step share; the result travels as `metadata.backend_plan`."""
        return None

    @abstractmethod
    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Attend; the step's own K and V are in the cache already.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            kv_cache: this layer's `[num_blocks, 2, num_kv_heads, block_size, head_size]`.
            metadata: the step.

        Returns:
            `[num_tokens, num_heads, head_size]`.
        """
