"""Quantise a transformers model in place, decoder layer by decoder layer, by the activations of calibration text.

Each layer sees what the layers before it, already quantised, make of the text, and so do the projections inside it:

    hidden -> [q, k, v] -> [o] -> [gate, up] -> [down] -> hidden of the next layer

A group's projections share their input, and so one Hessian; a group is quantised before the next one's inputs are
computed. One layer at a time is held in fp32, the rest in the checkpoint's dtype.

The output head, if wanted, comes last, by GPTQ too: its inputs are what the final norm makes of the last layer's
hidden states. Where its weights are the embedding's, it gets weights of its own, and the embedding keeps its.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from folovllm.quantization.checkpoint import HEAD
from folovllm.quantization.errors import QuantizationError
from folovllm.quantization.gptq import GPTQOptions, Hessian, quantize_layer
from folovllm.quantization.packing import PackedTensors

PROJECTION_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_HEAD_ROWS = 16384
"""Outputs of the head that are quantised at a time, which do not depend on each other: it bounds the fp32 copies."""
SCALE_DTYPE = torch.float16
"""What AutoGPTQ and GPTQModel store."""

OnPacked = Callable[[str, PackedTensors], None]
OnLayer = Callable[[int, int], None]


@dataclass(slots=True)
class _Batch:
    """One calibration window on its way through the layers."""

    hidden: torch.Tensor
    arguments: dict[str, Any]
    """What the model passes to every layer besides the hidden states."""


class _InputsTakenError(Exception):
    """Ends the model's forward pass before its first layer runs."""


@torch.no_grad()
def quantize_model(
    model: Any,
    windows: torch.Tensor,
    options: GPTQOptions,
    zero_offset: int,
    on_packed: OnPacked,
    on_layer: OnLayer,
    head_bits: int | None = None,
) -> None:
    """Replace the weights of every decoder layer's projections, and of the head, by their dequantised selves.

    Args:
        model: a transformers causal language model whose layers are named as Llama's.
        windows: token ids `[n, length]`.
        options: of the quantiser.
        zero_offset: 1 or 0, by the checkpoint format.
        on_packed: takes each projection's name and packed tensors.
        on_layer: takes the number of layers done, and of all, the head counted as one.
        head_bits: bits of the output head, all else as `options` say; None leaves it as it is.

    Raises:
        QuantizationError: the model has other layers, sizes that cannot be packed, or values that are not finite.
    """
    layers = _decoder_layers(model)
    _check_sizes({name: _linear(layers[0], name) for group in PROJECTION_GROUPS for name in group}, options.bits)
    if head_bits is not None:
        _check_sizes({HEAD: _linear(model, HEAD)}, head_bits)
    num_layers = len(layers) + (head_bits is not None)
    batches = [_first_inputs(model, layers[0], window) for window in windows]
    for index, layer in enumerate(layers):
        dtype = next(layer.parameters()).dtype
        layer.float()
        for names in PROJECTION_GROUPS:
            modules = {name: _linear(layer, name) for name in names}
            hessian = _collect(layer, next(iter(modules.values())), batches)
            for name, module in modules.items():
                try:
                    quantized = quantize_layer(module.weight, hessian, options, SCALE_DTYPE)
                except QuantizationError as error:
                    raise QuantizationError(f"model.layers.{index}.{name}: {error}") from error
                module.weight.copy_(quantized.dequantized())
                packed = quantized.packed(options.bits, zero_offset, SCALE_DTYPE)
                on_packed(f"model.layers.{index}.{name}", packed)
        for batch in batches:
            batch.hidden = _run(layer, batch)
        layer.to(dtype)
        on_layer(index + 1, num_layers)
    if head_bits is not None:
        on_packed(HEAD, _quantize_head(model, batches, replace(options, bits=head_bits), zero_offset))
        on_layer(num_layers, num_layers)


def _quantize_head(model: Any, batches: list[_Batch], options: GPTQOptions, zero_offset: int) -> PackedTensors:
    """By the hidden states after the last layer; gives the head weights of its own."""
    head, norm = _linear(model, HEAD), model.model.norm
    dtype = head.weight.dtype
    hessian = Hessian(head.in_features)
    norm.float()
    for batch in batches:
        hessian.add(norm(batch.hidden))
    norm.to(dtype)
    weight, parts = torch.empty_like(head.weight), []
    for start in range(0, head.out_features, _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        try:
            quantized = quantize_layer(head.weight[rows], hessian.matrix, options, SCALE_DTYPE)
        except QuantizationError as error:
            raise QuantizationError(f"{HEAD}: {error}") from error
        weight[rows] = quantized.dequantized().to(dtype)
        parts.append(quantized.packed(options.bits, zero_offset, SCALE_DTYPE))
    head.weight = nn.Parameter(weight, requires_grad=False)
    return PackedTensors(
        qweight=torch.cat([part.qweight for part in parts], 1),
        qzeros=torch.cat([part.qzeros for part in parts], 1),
        scales=torch.cat([part.scales for part in parts], 1),
        g_idx=parts[0].g_idx,  # the order of the inputs follows from the hessian alone
    )


def _decoder_layers(model: Any) -> list[nn.Module]:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise QuantizationError(f"{type(model).__name__} has no model.layers; only Llama-like decoders are supported")
    return list(layers)


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    try:
        module = parent.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(f"{type(parent).__name__} has no {name}") from error
    if not isinstance(module, nn.Linear):
        raise QuantizationError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module


def _check_sizes(modules: Mapping[str, nn.Linear], bits: int) -> None:
    pack = 32 // bits
    for name, module in modules.items():
        num_outputs, num_inputs = module.weight.shape
        if num_inputs % pack != 0 or num_outputs % pack != 0:
            raise QuantizationError(
                f"{name} has {num_inputs} inputs and {num_outputs} outputs; with {bits} bits both must be "
                f"multiples of {pack}"
            )


def _first_inputs(model: Any, layer: nn.Module, window: torch.Tensor) -> _Batch:
    taken: list[_Batch] = []

    def take(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        arguments = {name: _as_fp32(value) for name, value in kwargs.items() if name != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        taken.append(_Batch(hidden.float(), arguments))
        raise _InputsTakenError

    handle = layer.register_forward_pre_hook(take, with_kwargs=True)
    try:
        model(window[None], use_cache=False)
    except _InputsTakenError:
        pass
    finally:
        handle.remove()
    return taken[0]


def _as_fp32(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(_as_fp32(item) for item in value)
    return value


def _run(layer: nn.Module, batch: _Batch) -> torch.Tensor:
    output = layer(batch.hidden, **batch.arguments)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _collect(layer: nn.Module, module: nn.Linear, batches: list[_Batch]) -> torch.Tensor:
    """The Hessian of the module's inputs over all batches."""
    hessian = Hessian(module.in_features)
    with _inputs_to(module, hessian.add):
        for batch in batches:
            _run(layer, batch)
    return hessian.matrix


@contextmanager
def _inputs_to(module: nn.Module, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: take(args[0]))
    try:
        yield
    finally:
        handle.remove()
