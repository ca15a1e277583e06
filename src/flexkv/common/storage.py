"""Where the bytes of a block lie: in the engine's tensors, and in the pool of the CPU tier.

    engine, one tensor per layer        pool, BLOCKWISE: a block is one contiguous run
    any strides, any order of dims      [block][rank][layer][kv][d0][d1]..[element]
                                                             `- the other dims of the engine's block, outermost first

Inside a layer the pool keeps the engine's own order (by stride), so that copies run over whole contiguous pieces. The
order is part of the layout's fingerprint: engines that differ in it do not share blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flexkv.common.config import DTYPE_BYTES, ModelConfig
from flexkv.errors import ConfigError

LAYOUT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class BlockDim:
    """One dimension inside a block of a layer: its size in steps and its stride in bytes."""

    name: str
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """How one rank's engine keeps its KV blocks; the same for every layer.

    Attributes:
        num_layers: layers registered.
        num_blocks: blocks of the engine's pool.
        block_stride: bytes from one block to the next.
        dims: dimensions of a block of a layer, kv planes first, then as the engine orders them, outermost first.
        dtype: element type, one of `DTYPE_BYTES`.
        permutation: tensor dimensions in the order (block, *dims).
    """

    num_layers: int
    num_blocks: int
    block_stride: int
    dims: tuple[BlockDim, ...]
    dtype: str
    permutation: tuple[int, ...]

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block."""
        total = self.element_bytes
        for dim in self.dims:
            total *= dim.size
        return total

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of this rank, all layers."""
        return self.num_layers * self.layer_bytes

    @property
    def fingerprint(self) -> str:
        """Names the meaning of a block's bytes: equal for engines whose blocks are interchangeable."""
        dims = ",".join(f"{dim.name}={dim.size}" for dim in self.dims)
        return f"v{LAYOUT_VERSION};layers={self.num_layers};{dims};{self.dtype}"


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """The CPU tier's pool as one rank sees it.

    Attributes:
        num_blocks: blocks of the pool.
        block_bytes: bytes of a block, all ranks.
        rank_offset: where this rank's slice begins inside a block, in bytes.
        padding: bytes between two blocks, which nobody uses.
    """

    num_blocks: int
    block_bytes: int
    rank_offset: int = 0
    padding: int = 0

    @property
    def block_stride(self) -> int:
        """Bytes from one block to the next."""
        return self.block_bytes + self.padding

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_stride


def device_layout(kv_caches: Mapping[str, Any], model: ModelConfig, tokens_per_block: int) -> DeviceLayout:
    """Recognise the layout of an engine's KV tensors (torch tensors by layer name, in layer order).

    Accepted are tensors whose dimensions are, in any order with kv or blocks first: blocks, kv planes, tokens of a
    block, heads, elements of a head; the same without kv planes, where the elements are a key's and then a value's; and
    for MLA: blocks, tokens, elements.

    Raises:
        ConfigError: no layers, layers that differ, or a shape that is none of these.
    """
    if not kv_caches:
        raise ConfigError("no KV tensors to register; the engine has no layer with a KV cache")
    if len(kv_caches) != model.num_layers:
        raise ConfigError(f"the model has {model.num_layers} layers, {len(kv_caches)} KV tensors were registered")
    layouts = {name: _tensor_layout(name, t, model, tokens_per_block) for name, t in kv_caches.items()}
    (first_name, first), *others = layouts.items()
    for name, layout in others:
        if layout != first:
            raise ConfigError(f"KV tensors of {first_name!r} and {name!r} differ: {first} and {layout}")
    return first


def _tensor_layout(name: str, tensor: Any, model: ModelConfig, tokens_per_block: int) -> DeviceLayout:
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != model.dtype:
        raise ConfigError(f"KV tensor {name!r} holds {dtype}, the store was told {model.dtype}")
    names = _dim_names(name, shape, model, tokens_per_block)
    element_bytes = DTYPE_BYTES[dtype]
    dims = [BlockDim(names[i], shape[i], strides[i] * element_bytes) for i in range(len(shape))]
    block = names.index("block")
    inner = [i for i in range(len(shape)) if i != block]
    # kv planes lead whatever their stride; a stride of 0 (expanded tensor) would make two elements one.
    inner.sort(key=lambda i: (names[i] != "kv", -abs(strides[i]), i))
    for i in range(len(shape)):
        if shape[i] > 1 and strides[i] <= 0:
            raise ConfigError(f"KV tensor {name!r} has stride {strides[i]} in dimension {i}; its elements overlap")
    return DeviceLayout(
        num_layers=model.num_layers,
        num_blocks=shape[block],
        block_stride=dims[block].stride,
        dims=tuple(dims[i] for i in inner),
        dtype=dtype,
        permutation=(block, *inner),
    )


def _dim_names(name: str, shape: Sequence[int], model: ModelConfig, tokens_per_block: int) -> list[str]:
    """Name each dimension of a KV tensor: block, kv, token, head, element."""
    heads, size = model.num_kv_heads, model.head_size
    candidates: list[tuple[list[str], tuple[int, ...]]]
    if model.use_mla:
        candidates = [(["block", "token", "element"], (tokens_per_block, size))]
    else:
        # With as many heads as tokens the shape cannot tell; the first is the order of this project's own engine.
        inner = [
            (["head", "token", "element"], (heads, tokens_per_block, size)),
            (["token", "head", "element"], (tokens_per_block, heads, size)),
        ]
        candidates = [(["block", "kv", *names], (2, *sizes)) for names, sizes in inner]
        candidates += [(["kv", "block", *names], (2, *sizes)) for names, sizes in inner]
        # Key and value of a token side by side (vLLM on a CPU): one element twice as long, since a block is just bytes.
        candidates += [(["block", *names], (*sizes[:-1], 2 * size)) for names, sizes in inner]
    for names, sizes in candidates:
        without_block = tuple(extent for i, extent in enumerate(shape) if i != names.index("block"))
        if len(shape) == len(names) and without_block == sizes:
            return names
    raise ConfigError(
        f"KV tensor {name!r} of shape {list(shape)} is none of the known layouts for blocks of {tokens_per_block} "
        f"tokens, {heads} heads of {size}: " + "; ".join(f"[{', '.join(names)}]" for names, _ in candidates)
    )
