"""The native elementwise kernels do what torch code does, at every level of instructions."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from folovllm import _native
from folovllm.attention.ops import write_kv

DTYPES = ["float32", "bfloat16", "float16"]
# One step between neighbouring values: sums in another order may round to the next one.
STEP = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}
LEVELS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels limited to a level; one that this machine lacks falls back to a lower one."""
    _native.limit_isa(request.param)
    yield request.param
    _native.limit_isa("amx")


def normal(*shape: int, dtype: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def assert_within_a_step(actual: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=STEP[dtype] * 1.01, atol=1e-6)
    assert (actual == expected).float().mean() > (0.99 if dtype != "float32" else 0.1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1024])
def test_rms_norm_is_torchs(level: str, dtype: str, size: int) -> None:
    x, weight = normal(40, 2 * size, dtype=dtype) * 3, normal(size, dtype=dtype, seed=1)
    out = torch.empty(40, size, dtype=x.dtype)
    _native.rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), 40, size, 1e-6, dtype)
    assert_within_a_step(out, rms_norm(x[:, :size], weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_addition_and_the_norm(level: str, dtype: str) -> None:
    x, residual, weight = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(7, 96), (7, 96), (96,)]))
    expected_sum = residual + x
    expected = rms_norm(expected_sum, weight, 1e-5)
    _native.add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), x.data_ptr(), 7, 96, 1e-5, dtype)
    assert torch.equal(residual, expected_sum)
    assert_within_a_step(x, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 3072])
def test_silu_mul_is_torchs(level: str, dtype: str, size: int) -> None:
    gate_up = normal(9, 2 * size, dtype=dtype) * 4
    out = torch.empty(9, size, dtype=gate_up.dtype)
    _native.silu_mul(gate_up.data_ptr(), out.data_ptr(), 9, size, dtype)
    assert_within_a_step(out, F.silu(gate_up[:, :size]) * gate_up[:, size:], dtype)


def test_silu_mul_ends_where_torchs_does() -> None:
    gate = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, -200.0, -89.0, 89.0, 3e38, -3e38])
    gate_up = torch.cat((gate, torch.ones(10)))
    out = torch.empty(10)
    _native.silu_mul(gate_up.data_ptr(), out.data_ptr(), 1, 10, "float32")
    torch.testing.assert_close(out, F.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_embed_gathers_and_converts(level: str, table_dtype: str, dtype: str) -> None:
    table = normal(50, 48, dtype=table_dtype)
    ids = torch.tensor([3, 49, 0, 3], dtype=torch.int32)
    out = torch.empty(4, 37, dtype=getattr(torch, dtype))
    _native.embed(table.data_ptr(), 48, ids.data_ptr(), 4, 37, out.data_ptr(), table_dtype, dtype)
    assert torch.equal(out, table[ids.long(), :37].to(out.dtype))


def test_every_bfloat16_and_float16_converts_as_in_torch(level: str) -> None:
    for dtype in ("bfloat16", "float16"):
        patterns = torch.arange(65536).to(torch.int32).short().view(getattr(torch, dtype))
        wide, back = torch.empty(65536), torch.empty_like(patterns)
        zero = torch.zeros(1, dtype=torch.int32)
        _native.embed(patterns.data_ptr(), 0, zero.data_ptr(), 1, 65536, wide.data_ptr(), dtype, "float32")
        assert torch.equal(wide.nan_to_num(nan=-1.5), patterns.float().nan_to_num(nan=-1.5))
        _native.embed(wide.data_ptr(), 0, zero.data_ptr(), 1, 65536, back.data_ptr(), "float32", dtype)
        assert torch.equal(back.nan_to_num(nan=-1.5), patterns.nan_to_num(nan=-1.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("head_size", [64, 80])
def test_rotate_and_write_is_norm_rotation_and_write(level: str, dtype: str, has_norm: bool, head_size: int) -> None:
    heads, kv_heads, block_size, num_tokens = 6, 2, 4, 33
    qkv = normal(num_tokens, (heads + 2 * kv_heads) * head_size, dtype=dtype)
    norms = [normal(head_size, dtype=dtype, seed=i) for i in (2, 3)]
    cos_sin = normal(100, head_size, dtype=dtype, seed=4)
    positions = torch.arange(num_tokens) * 3
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:num_tokens]
    written = torch.arange(num_tokens) % 5 != 0
    cache = torch.full((15, 2, kv_heads, block_size, head_size), 7.0, dtype=qkv.dtype)
    query = torch.empty(num_tokens, heads * head_size, dtype=qkv.dtype)
    weights = [norm.data_ptr() if has_norm else 0 for norm in norms]
    layout = _native.QKVLayout(heads, kv_heads, head_size, block_size, dtype, cos_sin.data_ptr(), *weights, eps=1e-6)
    mapping = torch.where(written, slots, -1)
    _native.rotate_and_write(
        layout,
        *(qkv.data_ptr(), qkv.stride(0), positions.data_ptr(), mapping.data_ptr(), cache.data_ptr(), query.data_ptr()),
        num_tokens,
    )
    q, k, v = qkv.view(num_tokens, -1, head_size).split((heads, kv_heads, kv_heads), dim=1)
    if has_norm:
        q, k = (rms_norm(x, weight, 1e-6) for weight, x in zip(norms, (q, k), strict=True))
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    expected = torch.full_like(cache, 7.0)
    kept = slots[written]
    write_kv(
        expected,
        *(rotate(k, cos, sin)[written], v[written], kept // block_size, kept % block_size),
    )
    rotated = rotate(q, cos, sin).reshape(num_tokens, -1)
    if has_norm:
        tolerance = {"rtol": STEP[dtype] * 2, "atol": STEP[dtype] * 4}
        torch.testing.assert_close(query, rotated, **tolerance)
        torch.testing.assert_close(cache, expected, **tolerance)
        assert (query == rotated).float().mean() > (0.98 if dtype != "float32" else 0.1)
    else:
        assert torch.equal(query, rotated)
        assert torch.equal(cache, expected)


def test_levels_with_fused_multiply_adds_give_the_same_bits() -> None:
    x, weight = normal(5, 1000, dtype="bfloat16"), normal(500, dtype="bfloat16")
    outputs = []
    for level in LEVELS[1:]:
        _native.limit_isa(level)
        norm, activation = torch.empty(5, 500, dtype=x.dtype), torch.empty(5, 500, dtype=x.dtype)
        _native.rms_norm(x.data_ptr(), 1000, weight.data_ptr(), norm.data_ptr(), 5, 500, 1e-6, "bfloat16")
        _native.silu_mul(x.data_ptr(), activation.data_ptr(), 5, 500, "bfloat16")
        outputs.append(torch.cat((norm, activation)))
    _native.limit_isa("amx")
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_unknown_dtypes_and_bad_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is not known; it must be float32, bfloat16 or float16"):
        _native.silu_mul(0, 0, 0, 0, "int8")
    with pytest.raises(ValueError, match="head_size=7 is not allowed; it must be even and at least 2"):
        _native.QKVLayout(1, 1, 7, 16, "float32", 1)
