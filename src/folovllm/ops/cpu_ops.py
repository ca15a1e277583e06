"""The operations on a CPU: native kernels over buffers of the workspace (csrc/folovllm)."""

import torch

from folovllm import _native
from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.dtypes import DTYPE_NAMES
from folovllm.ops.abstract import HeadLayout, Ops
from folovllm.ops.workspace import Workspace


class CPULayout:
    """A `HeadLayout` as the kernel takes it, with the tensors it points into."""

    def __init__(self, layout: HeadLayout, dtype: str) -> None:
        self._kept_alive = layout
        self.width = layout.num_heads * layout.head_size
        self.num_heads, self.head_size = layout.num_heads, layout.head_size
        norms = layout.q_norm, layout.k_norm
        q_norm, k_norm = (0 if norm is None else norm.data_ptr() for norm in norms)
        self.native = _native.QKVLayout(
            layout.num_heads,
            layout.num_kv_heads,
            layout.head_size,
            layout.block_size,
            dtype,
            layout.cos_sin.data_ptr(),
            q_norm,
            k_norm,
            layout.eps,
        )


class CPUOps(Ops):
    """Every kernel checks nothing: shapes follow from the model, and are asserted where it is built."""

    def __init__(self, dtype: torch.dtype, workspace: Workspace) -> None:
        self.dtype = dtype
        self.workspace: Workspace = workspace
        self._dtype_name = DTYPE_NAMES[dtype]

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Converts from the table's dtype: it may be the checkpoint's own, mapped."""
        return self._gather("embed", table, ids)

    def take_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """As an embedding: torch would wake threads of its own."""
        return self._gather("take_rows", x, indices)

    def _gather(self, name: str, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        num_rows, size = len(ids), table.shape[1]
        out = self.workspace.rows(name, num_rows, size, self.dtype)
        _native.embed(
            table.data_ptr(),
            table.stride(0),
            ids.data_ptr(),
            num_rows,
            size,
            out.data_ptr(),
            DTYPE_NAMES[table.dtype],
            self._dtype_name,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Rows may lie apart."""
        num_rows, size = x.shape
        out = self.workspace.rows("norm", num_rows, size, self.dtype)
        _native.rms_norm(
            x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), num_rows, size, eps, self._dtype_name
        )
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One pass."""
        num_rows, size = x.shape
        out = self.workspace.rows("norm", num_rows, size, self.dtype)
        _native.add_rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            num_rows,
            size,
            eps,
            self._dtype_name,
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """One pass."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = self.workspace.rows("silu_mul", num_rows, size, self.dtype)
        _native.silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, size, self._dtype_name)
        return out

    def prepare_rotation(self, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The positions: the kernel looks the angles up."""
        return positions

    def make_layout(self, layout: HeadLayout) -> CPULayout:
        """The kernel's own description."""
        return CPULayout(layout, self._dtype_name)

    def rotate_and_write(
        self,
        layout: CPULayout,
        qkv: torch.Tensor,
        rotation: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """One pass over q, k and v."""
        num_tokens = len(qkv)
        query = self.workspace.rows("query", num_tokens, layout.width, self.dtype)
        _native.rotate_and_write(
            layout.native,
            qkv.data_ptr(),
            qkv.stride(0),
            rotation.data_ptr(),
            metadata.slot_mapping.data_ptr(),
            kv_cache.data_ptr(),
            query.data_ptr(),
            num_tokens,
        )
        return query.view(num_tokens, layout.num_heads, layout.head_size)
