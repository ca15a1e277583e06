"""The engine's own kernels over the paged cache on CUDA, for prefills, chunks and decodes alike.

Mirrors vllm/v1/attention/backends/triton_attn.py. The kernels are in `attention/triton_unified`, which is imported only
where they run: Triton is no requirement of the package.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.dtypes import DTYPE_NAMES
from folovllm.triton_support import has_triton

if TYPE_CHECKING:
    from folovllm.attention.triton_unified import HeadShape, LaunchPlan

_ITEM_SIZES = (2, 4)
_MAX_HEAD_SIZE = 256
_MIN_CAPABILITY = (8, 0)


class TritonUnifiedBackend(AttentionBackend):
    """Reads K and V where they lie, once for all query heads that share them; sums in fp32."""

    name = "triton_unified"
    supports_cuda_graphs = True
    num_sms: int | None = None
    """Multiprocessors to fill; None asks the device."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_size: int, block_size: int, batch_invariant: bool = False
    ) -> None:
        """REQUIRES: nothing is missing. How the keys are split depends on the batch, hence no batch invariance."""
        super().__init__(num_heads, num_kv_heads, head_size, block_size, batch_invariant)
        from folovllm.attention import triton_unified

        self._kernels = triton_unified

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        """On CUDA devices that Triton compiles for, in the three floating-point types of models."""
        if device.type != "cuda" or dtype not in DTYPE_NAMES or head_size > _MAX_HEAD_SIZE:
            return False
        return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY

    @classmethod
    def missing_package(cls) -> str | None:
        """Triton, which torch's builds for CUDA bring along."""
        return None if has_triton() else "triton"

    def plan(self, metadata: AttentionMetadata) -> dict[int, "LaunchPlan"]:
        """Shape the launch by the step's host numbers; bytes of an element -> plan."""
        query_lens, seq_lens = np.diff(metadata.query_start_loc_cpu), metadata.seq_lens_cpu
        num_sms = self.num_sms or _num_sms(metadata.seq_lens.device)
        size = (len(seq_lens), int(metadata.query_start_loc_cpu[-1]), int(query_lens.max()), int(seq_lens.max()))
        return {n: self._kernels.make_plan(self._shape(n), *size, num_sms) for n in _ITEM_SIZES}

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Attend."""
        plan = metadata.backend_plan[query.itemsize]
        return self._kernels.unified_attention(query, kv_cache, metadata, plan, self.scale)

    def _shape(self, itemsize: int) -> "HeadShape":
        group = self.num_heads // self.num_kv_heads
        return self._kernels.HeadShape(group, self.num_kv_heads, self.head_size, itemsize)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
