"""The engine's own kernels over the paged cache on a CPU, for prefills, chunks and decodes alike.

Mirrors vllm/v1/attention/backends/cpu_attn.py.
"""

from dataclasses import dataclass

import torch

from folovllm._native import PagedAttention
from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.dtypes import DTYPE_NAMES
from folovllm.ops.workspace import Workspace

# The kernels' own limit.
_MAX_HEAD_SIZE = 512


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """The step's tensors as the kernels take them, so that a layer's call converts three addresses only."""

    query_start_loc: int
    seq_lens: int
    block_tables: int
    block_table_stride: int
    num_reqs: int


class PagedBackend(AttentionBackend):
    """Reads K and V where they lie, once for all query heads that share them.

    A row's result has the same bits whatever its neighbours, chunk and number of threads: always in float32 and
    float16, and in bfloat16 where `batch_invariant` asks for it, which gives up the bfloat16 instructions.
    """

    name = "paged"
    plans_by_length = False
    is_batch_invariant = True

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_size: int, block_size: int, batch_invariant: bool = False
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_size, block_size, batch_invariant)
        self.workspace: Workspace = Workspace(torch.device("cpu"))
        self._kernels = {
            dtype: PagedAttention(num_heads, num_kv_heads, head_size, block_size, self.scale, name)
            for dtype, name in DTYPE_NAMES.items()
        }

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        """On a CPU, in the three floating-point types of models, for even head sizes."""
        return device.type == "cpu" and dtype in DTYPE_NAMES and head_size % 2 == 0 and head_size <= _MAX_HEAD_SIZE

    def plan(self, metadata: AttentionMetadata) -> PagedPlan:
        """Take the addresses of the step; `metadata` keeps the tensors alive."""
        starts, seq_lens, tables = metadata.query_start_loc, metadata.seq_lens, metadata.block_tables
        assert starts.dtype == seq_lens.dtype == tables.dtype == torch.int32
        assert all((starts.is_contiguous(), seq_lens.is_contiguous(), tables.stride(1) == 1))
        return PagedPlan(
            query_start_loc=starts.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_tables=tables.data_ptr(),
            block_table_stride=tables.stride(0),
            num_reqs=len(seq_lens),
        )

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Attend, into a buffer that the next call overwrites.

        Rows of `query` may lie apart, as in a fused QKV projection; each row is contiguous.
        """
        plan: PagedPlan = metadata.backend_plan
        num_tokens, num_heads, head_size = query.shape
        assert query.stride()[1:] == (head_size, 1)
        assert kv_cache.is_contiguous()
        output = self.workspace.rows("attention", num_tokens, num_heads * head_size, query.dtype)
        self._kernels[query.dtype].forward(
            query.data_ptr(),
            query.stride(0),
            kv_cache.data_ptr(),
            plan.query_start_loc,
            plan.seq_lens,
            plan.block_tables,
            plan.block_table_stride,
            plan.num_reqs,
            output.data_ptr(),
            num_heads * head_size,
            self.batch_invariant,
        )
        return output.view(num_tokens, num_heads, head_size)
