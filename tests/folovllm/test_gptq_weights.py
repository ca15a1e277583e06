"""GPTQ layers on every kernel equal their dequantised reference; what cannot be computed is refused by name."""

import itertools
import json

import pytest
import torch
from tests.folovllm.gptq_layers import fill, random_layer, whole_shape

from folovllm import _native
from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.linear_weights import LinearShape
from folovllm.model_executor.layers.quantization import GPTQConfig, GPTQLinearWeights, read_gptq_config
from folovllm.ops.workspace import Workspace
from folovllm.quantization.packing import PackedTensors, dequantize

CPU = torch.device("cpu")
BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(params=ISAS)
def isa(request):
    _native.limit_isa(request.param)
    if _native.current_isa() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _native.limit_isa("amx")


def make_weights(config, shape, dtype, *, native=True, batch_invariant=False):
    workspace = Workspace(CPU) if native else None
    return config.make_weights(shape, dtype, CPU, workspace, batch_invariant=batch_invariant)


def check_product(weights, reference, x, tolerance):
    expected = x.double() @ reference.double().t()
    difference = (weights.forward(x).double() - expected).abs().max()
    assert difference <= tolerance * expected.abs().max()


def configurations():
    for bits, group_size, desc_act, checkpoint_format in itertools.product(
        (4, 8), (32, 64, 128, -1), (False, True), ("gptq", "gptq_v2")
    ):
        if not (desc_act and group_size == -1):
            yield GPTQConfig(bits, group_size, desc_act, True, checkpoint_format)


def layer_of(config: GPTQConfig, num_outputs: int, num_inputs: int, seed: int = 0, **options) -> PackedTensors:
    return random_layer(
        num_outputs,
        num_inputs,
        bits=config.bits,
        group_size=config.group_size,
        zero_offset=config.zero_offset,
        desc_act=config.desc_act,
        seed=seed,
        **options,
    )


@pytest.mark.parametrize("config", list(configurations()), ids=str)
def test_every_format_gives_the_product_of_its_dequantised_weight(config):
    for sym, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16, torch.float16)):
        packed = layer_of(config, 72, 136, sym=sym)
        weights = make_weights(config, whole_shape(136, 72), dtype)
        fill(weights, [packed])
        reference = dequantize(packed, config.bits, config.zero_offset)
        assert torch.equal(weights.row_major(), reference)
        for num_rows in (1, 2, 3, 5, 7, 13, 64):
            x = torch.randn(num_rows, 136, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
            check_product(weights, reference, x, 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_every_instruction_set_gives_the_same_product(isa, bits, sym):
    config = GPTQConfig(bits, 128, True, sym)
    packed = layer_of(config, 136, 264, sym=sym, scale_dtype=torch.bfloat16)
    reference = dequantize(packed, bits, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = make_weights(config, whole_shape(264, 136), dtype)
        fill(weights, [packed])
        for num_rows in (1, 4, 11, 50):
            x = torch.randn(num_rows, 264, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
            check_product(weights, reference, x, 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(isa, dtype):
    config = GPTQConfig(4, 32, False, False)
    packed = layer_of(config, 72, 128)
    weights = make_weights(config, whole_shape(128, 72), dtype, batch_invariant=dtype is not torch.float32)
    fill(weights, [packed])
    x = torch.randn(250, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = weights.forward(x).clone()
    for start, stop in ((0, 1), (249, 250), (100, 107), (30, 90)):
        assert torch.equal(weights.forward(x[start:stop]), together[start:stop])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
def test_parts_with_orders_of_their_own_and_biases(native, desc_act):
    config = GPTQConfig(4, 32, desc_act, False)
    sizes = (40, 8, 24)
    parts = [layer_of(config, size, 96, seed=i) for i, size in enumerate(sizes)]
    biases = [torch.randn(size) for size in sizes]
    weights = make_weights(config, whole_shape(96, *sizes, bias=True), torch.float32, native=native)
    fill(weights, parts, biases)
    reference = torch.cat([dequantize(part, 4, 1) for part in parts])
    assert torch.equal(weights.row_major(), reference)
    x = torch.randn(5, 96)
    torch.testing.assert_close(weights.forward(x), x @ reference.t() + torch.cat(biases), rtol=1e-4, atol=1e-4)


def test_parts_of_one_order_are_computed_together():
    config = GPTQConfig(4, 32, True, False)
    weights = make_weights(config, whole_shape(96, 40, 24), torch.float32)
    fill(weights, [layer_of(config, 40, 96), layer_of(config, 24, 96, seed=1)])
    assert isinstance(weights, GPTQLinearWeights)
    assert len(weights.kernels) == 2
    one = layer_of(config, 40, 96)
    other = layer_of(config, 24, 96, seed=1)
    weights = make_weights(config, whole_shape(96, 40, 24), torch.float32)
    fill(weights, [one, PackedTensors(other.qweight, other.qzeros, other.scales, one.g_idx)])
    assert len(weights.kernels) == 1


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("native", [True, False])
def test_ranks_hold_their_shares(group_size, native):
    config = GPTQConfig(4, group_size, False, False)
    packed = layer_of(config, 48, 128)
    reference = dequantize(packed, 4, 1)
    for inputs, outputs in ((slice(64, 128), slice(0, 48)), (slice(0, 128), slice(16, 32))):
        shape = LinearShape(128, (48,), False, False, inputs, (outputs,))
        weights = make_weights(config, shape, torch.float32, native=native)
        fill(weights, [packed])
        assert torch.equal(weights.row_major(), reference[outputs, inputs])
        x = torch.randn(3, shape.num_inputs)
        torch.testing.assert_close(weights.forward(x), x @ reference[outputs, inputs].t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("native", [True, False])
def test_ranks_hold_their_shares_of_parts_that_the_checkpoint_fuses(desc_act, native):
    config = GPTQConfig(4, 32, desc_act, False)
    fused, bias = layer_of(config, 64, 96), torch.randn(64)
    tensors = {**fused.named(), "bias": bias}
    shares = (slice(16, 32), slice(8, 16), slice(8, 16))
    weights = make_weights(
        config, LinearShape(96, (32, 16, 16), True, True, slice(0, 96), shares), torch.float32, native=native
    )
    assert weights.fused_tensors() == {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
    for suffix, tensor in tensors.items():
        weights.load_fused(suffix, tensor)
    weights.finish()
    rows = [*range(16, 32), *range(40, 48), *range(56, 64)]
    assert weights.bias is not None
    assert torch.equal(weights.bias, bias[rows])
    assert torch.equal(weights.row_major(), dequantize(fused, 4, 1)[rows])


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (GPTQConfig(4, 32, False, True), whole_shape(60, 64), "60 inputs cannot be packed"),
        (GPTQConfig(4, 32, False, True), whole_shape(64, 64, 12), "12 outputs cannot be packed"),
        (
            GPTQConfig(4, 32, False, True),
            LinearShape(64, (64,), False, False, slice(0, 64), (slice(0, 12),)),
            "outputs",
        ),
        (
            GPTQConfig(4, 64, False, True),
            LinearShape(128, (64,), False, False, slice(32, 64), (slice(0, 64),)),
            "groups",
        ),
        (
            GPTQConfig(4, 32, True, True),
            LinearShape(64, (64,), False, False, slice(0, 32), (slice(0, 64),)),
            "desc_act",
        ),
    ],
)
def test_sizes_that_cut_words_or_groups_are_refused(config, shape, message):
    with pytest.raises(ModelLoadError, match=message):
        make_weights(config, shape, torch.float32)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("qweight", lambda t: t.float(), "qweight must be int32"),
        ("scales", lambda t: t.int(), "scales must be float16, bfloat16, float32"),
        ("g_idx", lambda t: t * 0, "g_idx does not share 64 inputs out in groups of 32"),
    ],
)
def test_tensors_of_another_kind_are_refused(suffix, change, message):
    config = GPTQConfig.from_dict(BASE)
    weights = make_weights(config, whole_shape(64, 32), torch.float32)
    tensors = layer_of(config, 32, 64).named()
    tensors[suffix] = change(tensors[suffix])
    with pytest.raises(ModelLoadError, match=message):
        fill(weights, [PackedTensors(**tensors)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits=3 .*4, 8"),
        ({"group_size": 16}, "group_size=16 .*-1, 32, 64, 128"),
        ({"quant_method": "awq"}, "'awq' .*gptq"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' .*gptq, gptq_v2"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"lm_head": "yes"}, "lm_head='yes'"),
        ({"modules_to_not_convert": ["o_proj"]}, "modules_to_not_convert"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"desc_act": "maybe"}, "desc_act='maybe'"),
    ],
)
def test_options_that_are_not_supported_are_named(changes, message):
    with pytest.raises(ModelLoadError, match=message):
        GPTQConfig.from_dict({**BASE, **changes})


def test_options_come_from_either_file(tmp_path):
    assert read_gptq_config(tmp_path, None) is None
    file = tmp_path / "quantize_config.json"
    file.write_text(json.dumps({"bits": 8, "group_size": -1, "desc_act": True, "sym": False, "damp_percent": 0.1}))
    assert read_gptq_config(tmp_path, None) == GPTQConfig(8, -1, True, False)
    assert read_gptq_config(tmp_path, {**BASE, "checkpoint_format": "gptq_v2"}) == GPTQConfig(
        4, 32, False, True, "gptq_v2"
    )
    file.write_text("[]")
    with pytest.raises(ModelLoadError, match=r"quantize_config\.json must hold a JSON object"):
        read_gptq_config(tmp_path, None)
    file.write_text("{")
    with pytest.raises(ModelLoadError, match=r"quantize_config\.json is not readable JSON"):
        read_gptq_config(tmp_path, None)
