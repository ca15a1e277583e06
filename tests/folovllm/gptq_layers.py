"""Random GPTQ layers in the checkpoint's form, and the layer contract over them."""

import torch

from folovllm.model_executor.layers.linear_weights import LinearShape, LinearWeights
from folovllm.quantization.packing import PackedTensors, pack_words, pack_zeros


def random_layer(
    num_outputs: int,
    num_inputs: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    zero_offset: int = 1,
    sym: bool = False,
    desc_act: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PackedTensors:
    """Every value a layer can hold, at random."""
    generator = torch.Generator().manual_seed(seed)
    size = num_inputs if group_size == -1 else group_size
    num_groups = -(-num_inputs // size)
    q = torch.randint(0, 2**bits, (num_inputs, num_outputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (num_groups, num_outputs), generator=generator)
    if sym:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = (torch.rand(num_groups, num_outputs, generator=generator) + 0.5) / 2**bits
    g_idx = torch.arange(num_inputs) // size
    if desc_act:
        g_idx = g_idx[torch.randperm(num_inputs, generator=generator)]
    return PackedTensors(
        pack_words(q, bits, 0), pack_zeros(zeros, bits, zero_offset), scales.to(scale_dtype), g_idx.to(torch.int32)
    )


def whole_shape(num_inputs: int, *parts: int, bias: bool = False) -> LinearShape:
    """A layer that one rank holds whole."""
    outputs = tuple(slice(0, part) for part in parts)
    return LinearShape(num_inputs, parts, bias, bias, slice(0, num_inputs), outputs)


def fill(weights: LinearWeights, parts: list[PackedTensors], biases: list[torch.Tensor] | None = None) -> None:
    """Load every tensor as the loader does, checking the announced shapes."""
    for index, part in enumerate(parts):
        tensors = part.named()
        if biases is not None:
            tensors["bias"] = biases[index]
        expected = weights.tensors(index)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
        for suffix, tensor in tensors.items():
            weights.load(index, suffix, tensor)
    weights.finish()
