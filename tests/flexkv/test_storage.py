"""Layouts of KV tensors are recognised, and copies through a pool move exactly the bytes they name."""

import itertools
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.common.config import DTYPE_BYTES, ModelConfig
from flexkv.common.storage import PoolLayout, device_layout
from flexkv.errors import ConfigError, TransferError
from flexkv.storage.allocator import CpuPool
from flexkv.transfer.device_copier import HostCopier
from flexkv.transfer.torch_copier import TorchCopier

LOGICAL = {"b": "block", "k": "kv", "h": "head", "t": "token", "e": "element"}


def kv_tensor(order: str, sizes: dict[str, int], dtype: torch.dtype, logical: str, padding: int = 0) -> torch.Tensor:
    """A tensor of shape `logical`, laid out in memory as `order`, each row of elements followed by padding."""
    shape = [sizes[dim] + (padding if dim == order[-1] else 0) for dim in order]
    raw = torch.zeros(shape, dtype=dtype)[..., : sizes[order[-1]]]
    return raw.permute([order.index(dim) for dim in logical])


def randomise(tensor: torch.Tensor, generator: torch.Generator) -> None:
    raw = torch.randint(0, 256, (*tensor.shape, tensor.element_size()), generator=generator, dtype=torch.uint8)
    tensor.copy_(
        raw.view(tensor.dtype).squeeze(-1) if tensor.element_size() > 1 else raw.squeeze(-1).view(tensor.dtype)
    )


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def block_bytes(tensors: list[torch.Tensor], logical: str, block: int) -> bytes:
    return b"".join(raw_bytes(t.select(logical.index("b"), block)) for t in tensors)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_strided_blocks_survive_the_round_trip(data):
    logical = data.draw(st.sampled_from(["bkhte", "bkthe", "kbhte", "kbthe"]))
    # The element dimension comes last in memory, as in every engine; the others in any order.
    order = "".join(data.draw(st.permutations("bkht"))) + "e"
    dtype_name = data.draw(st.sampled_from(sorted(DTYPE_BYTES)))
    size = st.integers(1, 5)
    sizes = {"b": data.draw(st.integers(3, 9)), "k": 2, "h": data.draw(size), "t": data.draw(size)}
    sizes["e"] = data.draw(st.integers(1, 33))
    padding = data.draw(st.integers(0, 3))
    num_layers = data.draw(st.integers(1, 3))
    copier_kind = data.draw(st.sampled_from([HostCopier, TorchCopier]))

    dtype = getattr(torch, dtype_name)
    tensors = [kv_tensor(order, sizes, dtype, logical, padding) for _ in range(num_layers)]
    model = ModelConfig(num_layers, sizes["h"], sizes["e"], dtype_name)
    kv_caches = {f"l{i}": tensor for i, tensor in enumerate(tensors)}
    layout = device_layout(kv_caches, model, sizes["t"])
    assert layout.block_bytes == model.rank_block_bytes(sizes["t"])

    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    for tensor in tensors:
        randomise(tensor, generator)
    offset = data.draw(st.sampled_from([0, layout.block_bytes]))
    gap = data.draw(st.sampled_from([0, 5, 64]))
    pool = CpuPool.create(PoolLayout(4, 2 * layout.block_bytes, padding=gap))
    if copier_kind is HostCopier:
        copier = HostCopier(kv_caches, layout, pool, offset, num_threads=2)
    else:
        copier = TorchCopier(kv_caches, layout, pool, offset)
    block_ids = st.lists(st.integers(0, sizes["b"] - 1), min_size=3, max_size=3, unique=True)
    source = np.array(data.draw(block_ids))
    in_pool = np.array(data.draw(st.permutations(range(4)))[:3])
    target = np.array(data.draw(block_ids))
    wanted = [block_bytes(tensors, logical, block) for block in source]
    untouched = set(range(sizes["b"])) - set(target.tolist())
    before = {block: block_bytes(tensors, logical, block) for block in untouched}
    everything = {"first_layer": 0, "num_layers": num_layers}
    copier.copy(to_device=False, device_blocks=source, pool_blocks=in_pool, **everything)
    copier.copy(to_device=True, device_blocks=target, pool_blocks=in_pool, **everything)

    assert [block_bytes(tensors, logical, block) for block in target] == wanted
    assert {block: block_bytes(tensors, logical, block) for block in untouched} == before
    rest = np.delete(pool.blocks(), in_pool, axis=0)
    assert not rest.any(), "a block nobody named was written"
    other = pool.blocks()[:, layout.block_bytes - offset :][:, : layout.block_bytes]
    assert not other.any(), "another rank's slice was written"


@pytest.mark.parametrize("copier_kind", [HostCopier, TorchCopier])
def test_copiers_refuse_what_is_out_of_range(copier_kind):
    model = ModelConfig(2, 1, 4, "float32")
    kv_caches = {str(i): torch.zeros(3, 2, 1, 2, 4) for i in range(2)}
    layout = device_layout(kv_caches, model, 2)
    pool = CpuPool.create(PoolLayout(2, layout.block_bytes))
    copier = (
        HostCopier(kv_caches, layout, pool, 0, 1)
        if copier_kind is HostCopier
        else TorchCopier(kv_caches, layout, pool, 0)
    )
    for device_block, pool_block, layers in ((3, 0, 2), (-1, 0, 2), (0, 2, 2), (0, 0, 3)):
        with pytest.raises(IndexError):
            copier.copy(
                to_device=True,
                device_blocks=np.array([device_block]),
                pool_blocks=np.array([pool_block]),
                first_layer=0,
                num_layers=layers,
            )


@pytest.mark.parametrize("copier_kind", [HostCopier, TorchCopier])
@pytest.mark.parametrize(("shape", "names"), [((6, 3, 4, 16), "head token"), ((6, 4, 3, 16), "token head")])
def test_a_key_and_its_value_may_lie_side_by_side(copier_kind, shape, names):
    model = ModelConfig(2, 3, 8, "float32")
    caches = {name: torch.randn(shape) for name in ("a", "b")}
    layout = device_layout(caches, model, 4)
    assert [dim.name for dim in layout.dims] == [*names.split(), "element"]
    assert layout.block_bytes == model.rank_block_bytes(4)
    wanted = [tensor[1].clone() for tensor in caches.values()]
    pool = CpuPool.create(PoolLayout(2, layout.block_bytes))
    copier = (
        HostCopier(caches, layout, pool, 0, 1) if copier_kind is HostCopier else TorchCopier(caches, layout, pool, 0)
    )
    for to_device, block in ((False, 1), (True, 5)):
        copier.copy(
            to_device=to_device,
            device_blocks=np.array([block]),
            pool_blocks=np.array([0]),
            first_layer=0,
            num_layers=2,
        )
    assert all(torch.equal(tensor[5], block) for tensor, block in zip(caches.values(), wanted, strict=True))


def test_mla_has_one_plane():
    model = ModelConfig(1, 1, 8, "bfloat16", use_mla=True)
    layout = device_layout({"l": torch.zeros(5, 4, 8, dtype=torch.bfloat16)}, model, 4)
    assert [dim.name for dim in layout.dims] == ["token", "element"]
    assert layout.block_bytes == 4 * 8 * 2


def test_the_order_in_memory_decides_when_the_shape_cannot():
    sizes = {"b": 6, "k": 2, "h": 4, "t": 4, "e": 8}
    model = ModelConfig(1, 4, 8, "float32")
    for order, names in (("bkhte", ["kv", "head", "token", "element"]), ("bkthe", ["kv", "token", "head", "element"])):
        tensor = kv_tensor(order, sizes, torch.float32, "bkhte")
        assert [dim.name for dim in device_layout({"l": tensor}, model, 4).dims] == names


def test_fingerprints_tell_orders_apart():
    sizes = {"b": 6, "k": 2, "h": 3, "t": 4, "e": 8}
    model = ModelConfig(1, 3, 8, "float32")
    prints = {
        device_layout({"l": kv_tensor(order, sizes, torch.float32, "bkhte")}, model, 4).fingerprint
        for order in ("bkhte", "bkthe", "kbhte")
    }
    assert len(prints) == 2, "kv-first and block-first engines can share, head-first and token-first cannot"


@pytest.mark.parametrize(
    ("kv_caches", "message"),
    [
        ({}, "no KV tensors"),
        ({"a": torch.zeros(3, 2, 1, 2, 4)}, "2 layers, 1 KV"),
        ({"a": torch.zeros(3, 2, 1, 2, 4), "b": torch.zeros(4, 2, 1, 2, 4)}, "differ"),
        ({"a": torch.zeros(3, 2, 1, 2, 5), "b": torch.zeros(3, 2, 1, 2, 5)}, "none of the known layouts"),
        ({"a": torch.zeros(3, 2, 1, 2, 4).half(), "b": torch.zeros(3, 2, 1, 2, 4).half()}, "float16"),
        ({n: torch.zeros(3, 2, 1, 1, 4).expand(3, 2, 1, 2, 4) for n in "ab"}, "overlap"),
    ],
)
def test_unknown_layouts_are_refused_by_name(kv_caches, message):
    with pytest.raises(ConfigError, match=message):
        device_layout(kv_caches, ModelConfig(2, 1, 4, "float32"), 2)


def test_a_pool_travels_over_a_socket():
    layout = PoolLayout(4, 64)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs, CpuPool.create(layout) as pool:
        pool.send(ours)
        theirs.settimeout(5.0)
        with CpuPool.receive(layout, theirs) as mapped:
            pool.blocks()[2] = 7
            assert mapped.blocks()[2].tolist() == [7] * 64
            pool.send(ours)
            with pytest.raises(TransferError, match="expected were 320"):
                CpuPool.receive(PoolLayout(5, 64), theirs)
        ours.close()
        with pytest.raises(TransferError, match="closed the connection"):
            CpuPool.receive(layout, theirs)


def test_blocks_of_a_padded_pool_are_contiguous_and_apart():
    layout = PoolLayout(3, 60, padding=4)
    assert (layout.block_stride, layout.pool_bytes) == (64, 192)
    with CpuPool.create(layout) as pool:
        blocks = pool.blocks()
        assert blocks.shape == (3, 60)
        assert blocks[1].flags.c_contiguous
        assert blocks[1].ctypes.data == pool.address + 64
        del blocks


def test_every_permutation_of_inner_dims_is_accepted():
    sizes = {"b": 7, "k": 2, "h": 3, "t": 4, "e": 8}
    model = ModelConfig(1, 3, 8, "float32")
    for order in itertools.permutations("bkht"):
        tensor = kv_tensor("".join(order) + "e", sizes, torch.float32, "bkhte")
        layout = device_layout({"l": tensor}, model, 4)
        assert layout.num_blocks == 7
        assert layout.dims[0].name == "kv"
