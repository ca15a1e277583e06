"""GPTQ weights of linear layers. Mirrors vllm/model_executor/layers/quantization/gptq.py.

What a checkpoint holds is drawn in folovllm/quantization/packing.py. On a CPU the native kernels run on weights packed
once from the memory map (csrc/folovllm/quantized_linear.h); elsewhere the weights are dequantised when they load.
Modules may have settings of their own (`dynamic`, folovllm/quantization/dynamic.py), and the output head may be
quantised (`lm_head`). Left out, and refused by name: bit widths other than 4 and 8, projections of one input that are
merged here and have different settings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from folovllm import _native
from folovllm.dtypes import DTYPE_NAMES
from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.gptq_parts import GPTQParts
from folovllm.model_executor.layers.linear_weights import LinearShape, LinearWeights, TorchWeights
from folovllm.ops.workspace import Workspace
from folovllm.quantization.dynamic import DynamicRule, find_rule, one_of, parse_dynamic
from folovllm.quantization.packing import PackedTensors, dequantize

BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
ALLOWED: dict[str, tuple[Any, ...]] = {
    "bits": BITS,
    "group_size": GROUP_SIZES,
    "desc_act": (False, True),
    "sym": (False, True),
}
"""What the settings of a layer can be."""
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""Checkpoint format -> what is to be added to a stored zero point."""

# Options that change what the checkpoint holds, with the only value that is supported.
_REQUIRED = {"is_marlin_format": False, "pack_dtype": "int32"}
_MUST_BE_EMPTY = ("modules_to_not_convert",)


@dataclass(frozen=True, slots=True)
class GPTQConfig:
    """config.json's quantization_config (or quantize_config.json) of a GPTQ checkpoint."""

    bits: int
    group_size: int
    """Inputs that share a scale; -1: all of them."""
    desc_act: bool
    """Whether inputs were quantised by descending activation, so that groups are scattered over K."""
    sym: bool
    checkpoint_format: str = "gptq"
    """"gptq" stores zero points less one, "gptq_v2" as they are."""
    lm_head: bool = False
    """Whether the output head is quantised, unless a rule excludes it."""
    dynamic: tuple[DynamicRule, ...] = ()
    """Settings of single modules; the first rule that matches holds."""

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "GPTQConfig":
        """Read and check.

        Raises:
            ModelLoadError: a method, width, group size or option that is not supported; it is named.
        """
        method = options.get("quant_method", "gptq")
        if method != "gptq":
            raise ModelLoadError(f"quantised checkpoints of quant_method {method!r} are not supported; supported: gptq")
        for name, value in _REQUIRED.items():
            given = options.get(name, value)
            if str(given).removeprefix("torch.") != str(value):
                raise ModelLoadError(f"GPTQ option {name}={given!r} is not supported; it must be {value!r}")
        for name in _MUST_BE_EMPTY:
            if options.get(name):
                raise ModelLoadError(f"GPTQ option {name} is not supported; exclude modules by rules in dynamic")
        checkpoint_format = options.get("checkpoint_format") or options.get("format") or "gptq"
        return cls(
            bits=one_of("bits", options.get("bits"), ALLOWED["bits"]),
            group_size=one_of("group_size", options.get("group_size", -1), ALLOWED["group_size"]),
            desc_act=one_of("desc_act", options.get("desc_act", False), ALLOWED["desc_act"]),
            sym=one_of("sym", options.get("sym", True), ALLOWED["sym"]),
            checkpoint_format=one_of("checkpoint_format", checkpoint_format, tuple(ZERO_OFFSETS)),
            lm_head=one_of("lm_head", options.get("lm_head", False), (False, True)),
            dynamic=parse_dynamic(options.get("dynamic"), ALLOWED),
        )

    def of_linear(self, modules: Sequence[str]) -> "GPTQConfig | None":
        """The settings of one linear layer, by the rules; None: it is not quantised.

        Args:
            modules: the checkpoint's names of its parts, or of the one that holds them all.

        Raises:
            ModelLoadError: the rules tell its parts apart.
        """
        settings = [self._of_module(module) for module in modules]
        if any(other != settings[0] for other in settings):
            raise ModelLoadError(
                f"GPTQ option dynamic gives {', '.join(modules)} different settings; they are computed as one layer, "
                "and must have the same"
            )
        return settings[0]

    def of_head(self, module: str) -> "GPTQConfig | None":
        """The settings of the output head; None: it is not quantised."""
        return self._of_module(module) if self.lm_head else None

    def _of_module(self, module: str) -> "GPTQConfig | None":
        rule = find_rule(self.dynamic, module)
        if rule is not None and rule.overrides is None:
            return None
        return replace(self, **({} if rule is None else rule.overrides or {}), lm_head=False, dynamic=())

    @property
    def output_unit(self) -> int:
        """Outputs whose zero points lie in one word: ranks cannot part them."""
        return 32 // self.bits

    @property
    def zero_offset(self) -> int:
        """What is to be added to a stored zero point."""
        return ZERO_OFFSETS[self.checkpoint_format]

    def make_weights(
        self,
        shape: LinearShape,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace | None,
        *,
        batch_invariant: bool,
    ) -> LinearWeights:
        """Empty weights of one layer: for the native kernels if there is a workspace, else for torch.

        Raises:
            ModelLoadError: the layer's size, or this rank's share of it, cuts a packed word or a group.
        """
        _check_shape(self, shape)
        if workspace is None:
            return DequantizedGPTQWeights(self, shape, dtype, device)
        return GPTQLinearWeights(self, shape, dtype, workspace, batch_invariant=batch_invariant)


def read_gptq_config(directory: Path, hf_quantization_config: Mapping[str, Any] | None) -> GPTQConfig | None:
    """The checkpoint's GPTQ options: config.json's, or else those in quantize_config.json; None if it has neither.

    Raises:
        ModelLoadError: they ask for something that is not supported, or the file is no JSON object.
    """
    if hf_quantization_config is not None:
        return GPTQConfig.from_dict(hf_quantization_config)
    file = directory / "quantize_config.json"
    if not file.is_file():
        return None
    try:
        options = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(options, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, not {options!r}")
    return GPTQConfig.from_dict(options)


class GPTQLinearWeights(LinearWeights):
    """Packed for the native kernels of a CPU, which dequantise in registers."""

    def __init__(
        self, config: GPTQConfig, shape: LinearShape, dtype: torch.dtype, workspace: Workspace, *, batch_invariant: bool
    ) -> None:
        super().__init__(shape)
        self.config = config
        self.dtype = dtype
        self.workspace = workspace
        self.batch_invariant = batch_invariant
        self.bias = torch.zeros(shape.num_outputs, dtype=torch.float32) if shape.applies_bias else None
        self.kernels: list[tuple[int, int, _native.QuantizedLinear]] = []
        """First output column, number of columns, kernel: one for all parts, or one each if their orders differ."""
        self._parts = GPTQParts(config.bits, config.group_size, shape)
        self._num_outputs = shape.num_outputs
        self._dtype_name = DTYPE_NAMES[dtype]

    def tensors(self, part: int) -> dict[str, tuple[int, ...]]:
        """The four packed tensors, and the bias."""
        return self._parts.tensors(part)

    def output_axis(self, suffix: str) -> int | None:
        """Of the packed tensors."""
        return self._parts.output_axis(suffix)

    def load(self, part: int, suffix: str, tensor: torch.Tensor) -> None:
        """Pack, once the layer is complete."""
        if suffix == "bias":
            load_bias(self, part, tensor)
        elif self._parts.add(part, suffix, tensor):
            self._pack(self._parts.take())

    def _pack(self, parts: list[PackedTensors]) -> None:
        orders = [_order_by_group(self.config, part.g_idx) for part in parts]
        scale_dtypes = {part.scales.dtype for part in parts}
        scale_dtype = scale_dtypes.pop() if len(scale_dtypes) == 1 else torch.float32
        first = orders[0]
        if all(_same_order(order, first) for order in orders):
            self._pack_together(0, parts, first, scale_dtype)
        else:
            for i, (part, order) in enumerate(zip(parts, orders, strict=True)):
                self._pack_together(self.shape.offset(i), [part], order, scale_dtype)

    def _pack_together(
        self, offset: int, parts: list[PackedTensors], order: torch.Tensor | None, scale_dtype: torch.dtype
    ) -> None:
        num_columns = sum(part.scales.shape[1] for part in parts)
        size, num_inputs = self.config.group_size, self.shape.num_inputs
        group_size = num_inputs if size == -1 else size
        names = DTYPE_NAMES[scale_dtype]
        kernel = _native.QuantizedLinear(num_columns, num_inputs, self.config.bits, group_size, self._dtype_name, names)
        if order is not None:
            kernel.set_permutation(order.data_ptr())
        start = 0
        for part in parts:
            qweight, qzeros = _with_rows(part.qweight), _with_rows(part.qzeros)
            scales = _with_rows(part.scales.to(scale_dtype))
            kernel.fill(
                start,
                scales.shape[1],
                qweight.data_ptr(),
                qweight.stride(0),
                qzeros.data_ptr(),
                qzeros.stride(0),
                scales.data_ptr(),
                scales.stride(0),
                self.config.zero_offset,
            )
            start += scales.shape[1]
        self.kernels.append((offset, num_columns, kernel))

    def finish(self) -> None:
        """Hand the bias over."""
        for offset, _, kernel in self.kernels:
            if self.bias is not None:
                kernel.set_bias(self.bias.data_ptr() + offset * self.bias.itemsize)

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Into a buffer of the workspace."""
        num_rows = len(x)
        out = self.workspace.rows("linear", num_rows, self._num_outputs, out_dtype or self.dtype)
        out_name = self._dtype_name if out_dtype is None else DTYPE_NAMES[out_dtype]
        for offset, _, kernel in self.kernels:
            kernel.forward(
                x.data_ptr(),
                num_rows,
                x.stride(0),
                out.data_ptr() + offset * out.itemsize,
                self._num_outputs,
                out_name,
                self.batch_invariant,
            )
        return out

    def row_major(self) -> torch.Tensor:
        """Dequantised in fp32."""
        weight = torch.empty(self._num_outputs, self.shape.num_inputs)
        for offset, num_columns, kernel in self.kernels:
            kernel.unpack(0, num_columns, weight[offset:].data_ptr())
        return weight


class DequantizedGPTQWeights(TorchWeights):
    """Dequantised when they load: torch's matrix product, on any device."""

    def __init__(self, config: GPTQConfig, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.config = config
        self._parts = GPTQParts(config.bits, config.group_size, shape)

    def tensors(self, part: int) -> dict[str, tuple[int, ...]]:
        """The four packed tensors, and the bias."""
        return self._parts.tensors(part)

    def output_axis(self, suffix: str) -> int | None:
        """Of the packed tensors."""
        return self._parts.output_axis(suffix)

    def load(self, part: int, suffix: str, tensor: torch.Tensor) -> None:
        """Dequantise, once the layer is complete."""
        if suffix == "bias":
            load_bias(self, part, tensor)
        elif self._parts.add(part, suffix, tensor):
            for i, packed in enumerate(self._parts.take()):
                weight = dequantize(packed, self.config.bits, self.config.zero_offset)
                start = self.shape.offset(i)
                self.weight[start : start + len(weight)].copy_(weight)


def load_bias(weights: LinearWeights, part: int, tensor: torch.Tensor) -> None:
    """Copy this rank's share of a part's bias.

    Raises:
        ModelLoadError: it holds integers.
    """
    if not tensor.is_floating_point():
        raise ModelLoadError(f"it is {tensor.dtype}; a bias must be floating point")
    if weights.bias is not None:
        source = tensor[weights.shape.outputs[part]]
        start = weights.shape.offset(part)
        weights.bias[start : start + len(source)].copy_(source)


def _check_shape(config: GPTQConfig, shape: LinearShape) -> None:
    pack = 32 // config.bits
    for what, size in (("inputs", shape.in_features), *(("outputs", part) for part in shape.parts)):
        if size % pack != 0:
            raise ModelLoadError(f"a layer with {size} {what} cannot be packed in {config.bits} bits")
    for outputs in shape.outputs:
        if outputs.start % pack != 0 or outputs.stop % pack != 0:
            raise ModelLoadError(f"the outputs of a layer cannot be shared out: its packed words hold {pack} each")
    if shape.inputs != slice(0, shape.in_features):
        if config.desc_act:
            raise ModelLoadError("a GPTQ checkpoint with desc_act cannot be shared out: its groups lie scattered")
        unit = pack if config.group_size == -1 else config.group_size
        if shape.inputs.start % unit != 0 or (shape.inputs.stop % unit != 0 and shape.inputs.stop != shape.in_features):
            raise ModelLoadError(f"the {shape.in_features} inputs of a layer cannot be shared out in groups of {unit}")


def _order_by_group(config: GPTQConfig, g_idx: torch.Tensor) -> torch.Tensor | None:
    """The order of the inputs in which groups are contiguous, int32 `[K]`; None if they are already."""
    num_inputs = len(g_idx)
    size = num_inputs if config.group_size == -1 else config.group_size
    plain = torch.arange(num_inputs, dtype=torch.int32) // size
    if torch.equal(g_idx, plain):
        return None
    if config.group_size == -1:
        raise ModelLoadError(f"with group_size=-1 every input belongs to group 0, but g_idx names {int(g_idx.max())}")
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], plain):
        raise ModelLoadError(f"g_idx does not share {num_inputs} inputs out in groups of {size}")
    return order.to(torch.int32)


def _same_order(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is right if left is None or right is None else torch.equal(left, right)


def _with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous rows: as it lies in the map, if it does."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
