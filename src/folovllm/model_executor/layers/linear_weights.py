"""How the weights of a linear layer are held and applied. The counterpart of vLLM's LinearMethodBase.

One class per format: torch's own, packed for the native kernels, quantised (layers/quantization.py). A merged layer
computes several projections of the same input in one matrix product; its parts are named as in the checkpoint and lie
one after the other in the output:

    output row  =  q_proj's columns | k_proj's | v_proj's

Some checkpoints hold the parts as one fused projection, in the same order; it is cut into its parts when it is loaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from folovllm import _native
from folovllm.dtypes import DTYPE_NAMES
from folovllm.errors import ModelLoadError
from folovllm.ops.abstract import Ops
from folovllm.ops.workspace import Workspace

# Outputs that kernels compute together (csrc/folovllm/packed_weights.h).
_PANEL_WIDTH = 16


def _length(part: slice) -> int:
    return int(part.stop - part.start)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer, and the share of it that this rank holds."""

    in_features: int
    """Of the checkpoint."""
    parts: tuple[int, ...]
    """out_features of each part, of the checkpoint."""
    has_bias: bool
    """Whether the checkpoint has one for every part."""
    applies_bias: bool
    """Whether this rank adds it: of the ranks whose results are summed, only the first does."""
    inputs: slice
    """This rank's input columns: all, or with a row-parallel layer its share."""
    outputs: tuple[slice, ...]
    """This rank's output columns of each part: all, or with a column-parallel layer its share."""

    @property
    def num_inputs(self) -> int:
        """Input columns of this rank."""
        return _length(self.inputs)

    @property
    def num_outputs(self) -> int:
        """Output columns of this rank, all parts together."""
        return sum(map(_length, self.outputs))

    def offset(self, part: int) -> int:
        """Where this rank's columns of `part` begin in its output."""
        return sum(map(_length, self.outputs[:part]))


class LinearWeights(ABC):
    """The weights of one layer on one rank: filled part by part, then applied."""

    def __init__(self, shape: LinearShape) -> None:
        self.shape = shape
        self.bias: torch.Tensor | None = None
        """`[num_outputs]`, if this rank adds one."""

    @abstractmethod
    def tensors(self, part: int) -> dict[str, tuple[int, ...]]:
        """What the checkpoint holds of a part: suffix ("weight", "bias", "qweight", ...) -> its whole shape."""

    @abstractmethod
    def load(self, part: int, suffix: str, tensor: torch.Tensor) -> None:
        """Take this rank's share of a memory-mapped tensor whose shape is that of `tensors`.

        Raises:
            ModelLoadError: its dtype is not one this format can have.
        """

    def output_axis(self, suffix: str) -> int | None:
        """The axis of a tensor along which its outputs lie; None: it is the same for all outputs."""
        return 0

    def fused_tensors(self) -> dict[str, tuple[int, ...]]:
        """What the checkpoint holds of all parts, if it holds them as one projection: suffix -> whole shape."""
        return {suffix: self._fused_shape(suffix) for suffix in self.tensors(0)}

    def load_fused(self, suffix: str, tensor: torch.Tensor) -> None:
        """`load` of every part, from the tensor that holds them all.

        Raises:
            ModelLoadError: its dtype is not one this format can have.
        """
        axis = self.output_axis(suffix)
        start = 0
        for part in range(len(self.shape.parts)):
            if axis is None:
                self.load(part, suffix, tensor)
            else:
                size = self.tensors(part)[suffix][axis]
                self.load(part, suffix, tensor.narrow(axis, start, size))
                start += size

    def _fused_shape(self, suffix: str) -> tuple[int, ...]:
        axis, first = self.output_axis(suffix), self.tensors(0)[suffix]
        if axis is None:
            return first
        size = sum(self.tensors(part)[suffix][axis] for part in range(len(self.shape.parts)))
        return (*first[:axis], size, *first[axis + 1 :])

    def finish(self) -> None:  # noqa: B027  (most formats have nothing left to do)
        """Everything has come; called once."""

    @abstractmethod
    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """`[num_rows, num_inputs]` -> `[num_rows, num_outputs]`, in the dtype of `x` unless told otherwise."""

    def forward_silu_mul(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """silu(gate) * up, where `forward` gives rows `gate | up`."""
        return ops.silu_mul(self.forward(x))

    @abstractmethod
    def row_major(self) -> torch.Tensor:
        """A copy of the weights as `[num_outputs, num_inputs]`, dequantised; for tests and tools."""


class QuantizationConfig(Protocol):
    """A quantised format, as the checkpoint's config.json declares it: of all layers, then of one."""

    def of_linear(self, modules: Sequence[str]) -> "QuantizationConfig | None":
        """That of the linear layer which the checkpoint holds as these modules; None: it is not quantised.

        Raises:
            ModelLoadError: the modules are not quantised alike.
        """
        ...

    def of_head(self, module: str) -> "QuantizationConfig | None":
        """That of the output head; None: it is not quantised."""
        ...

    @property
    def output_unit(self) -> int:
        """Ranks can share a layer's outputs out in multiples of this."""
        ...

    def make_weights(
        self,
        shape: LinearShape,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace | None,
        *,
        batch_invariant: bool,
    ) -> LinearWeights:
        """Empty weights of one layer; `workspace` is None where native kernels are not used."""
        ...


class TorchWeights(LinearWeights):
    """A plain tensor and torch's matrix product: any device."""

    def __init__(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape)
        self.weight = torch.empty(shape.num_outputs, shape.num_inputs, dtype=dtype, device=device)
        self.bias = torch.empty(shape.num_outputs, dtype=dtype, device=device) if shape.applies_bias else None

    def tensors(self, part: int) -> dict[str, tuple[int, ...]]:
        """The weight, row-major, and the bias."""
        return plain_tensors(self.shape, part)

    def load(self, part: int, suffix: str, tensor: torch.Tensor) -> None:
        """Copy, converted."""
        require_floating_point(tensor)
        start = self.shape.offset(part)
        if suffix == "bias":
            if self.bias is not None:
                source = tensor[self.shape.outputs[part]]
                self.bias[start : start + len(source)].copy_(source)
        else:
            source = tensor[self.shape.outputs[part], self.shape.inputs]
            self.weight[start : start + len(source)].copy_(source)

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """torch's linear."""
        out = F.linear(x, self.weight, self.bias)
        return out if out_dtype is None else out.to(out_dtype)

    def row_major(self) -> torch.Tensor:
        """A copy."""
        return self.weight.clone()


class PackedWeights(LinearWeights):
    """Packed once, straight from the memory map, for the native kernels of a CPU (csrc/folovllm/packed_linear.h)."""

    def __init__(self, shape: LinearShape, dtype: torch.dtype, workspace: Workspace, *, batch_invariant: bool) -> None:
        super().__init__(shape)
        self.dtype = dtype
        self.workspace = workspace
        self.batch_invariant = batch_invariant
        self.packed = _native.PackedLinear(shape.num_outputs, shape.num_inputs, DTYPE_NAMES[dtype])
        self.bias = torch.zeros(shape.num_outputs, dtype=torch.float32) if shape.applies_bias else None
        self._num_outputs = shape.num_outputs
        self._dtype_name = DTYPE_NAMES[dtype]

    def tensors(self, part: int) -> dict[str, tuple[int, ...]]:
        """The weight, row-major, and the bias."""
        return plain_tensors(self.shape, part)

    def load(self, part: int, suffix: str, tensor: torch.Tensor) -> None:
        """Pack."""
        require_floating_point(tensor)
        start = self.shape.offset(part)
        if suffix == "bias":
            if self.bias is not None:
                source = tensor[self.shape.outputs[part]]
                self.bias[start : start + len(source)].copy_(source)
            return
        source = tensor[self.shape.outputs[part], self.shape.inputs]
        if source.dtype not in DTYPE_NAMES or source.stride(1) != 1:
            source = source.to(self.dtype).contiguous()
        self.packed.fill(start, len(source), source.data_ptr(), source.stride(0), DTYPE_NAMES[source.dtype])

    def finish(self) -> None:
        """Hand the bias over."""
        if self.bias is not None:
            self.packed.set_bias(self.bias.data_ptr(), "float32")

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Into a buffer of the workspace."""
        num_rows = len(x)
        out = self.workspace.rows("linear", num_rows, self._num_outputs, out_dtype or self.dtype)
        self.packed.forward(
            x.data_ptr(),
            num_rows,
            x.stride(0),
            out.data_ptr(),
            self._num_outputs,
            self._dtype_name if out_dtype is None else DTYPE_NAMES[out_dtype],
            self.batch_invariant,
        )
        return out

    def forward_silu_mul(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """In one call where both halves are whole panels of weights."""
        if self._num_outputs % (2 * _PANEL_WIDTH) != 0:
            return super().forward_silu_mul(x, ops)
        num_rows, size = len(x), self._num_outputs // 2
        out = self.workspace.rows("silu_mul", num_rows, size, self.dtype)
        self.packed.forward_silu_mul(x.data_ptr(), num_rows, x.stride(0), out.data_ptr(), size, self.batch_invariant)
        return out

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (`[n]` int32) of the weight, in a buffer of their own in the workspace."""
        num_rows = len(ids)
        out = self.workspace.rows("gather", num_rows, self.shape.num_inputs, self.dtype)
        self.packed.gather(ids.data_ptr(), num_rows, out.data_ptr())
        return out

    def row_major(self) -> torch.Tensor:
        """Unpacked."""
        out = torch.empty(self.shape.num_outputs, self.shape.num_inputs, dtype=self.dtype)
        self.packed.unpack(0, self.shape.num_outputs, out.data_ptr())
        return out


def plain_tensors(shape: LinearShape, part: int) -> dict[str, tuple[int, ...]]:
    """What an unquantised checkpoint holds of a part."""
    out_features = shape.parts[part]
    tensors: dict[str, tuple[int, ...]] = {"weight": (out_features, shape.in_features)}
    if shape.has_bias:
        tensors["bias"] = (out_features,)
    return tensors


def require_floating_point(tensor: torch.Tensor) -> None:
    """Return when the tensor can be a weight.

    Raises:
        ModelLoadError: it holds integers.
    """
    if not tensor.is_floating_point():
        raise ModelLoadError(f"it is {tensor.dtype}; only floating point weights are supported")
