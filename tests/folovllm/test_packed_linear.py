"""Native linear layers do what torch's do, from weights packed out of a matrix of any dtype."""

import threading
from collections.abc import Iterator

import pytest
import torch

from folovllm import _native
from folovllm._native import PackedLinear

DTYPES = ["float32", "bfloat16", "float16"]
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels limited to a level; one that this machine lacks falls back to a lower one."""
    _native.limit_isa(request.param)
    yield request.param
    _native.limit_isa("amx")


def normal(*shape: int, dtype: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def packed(weight: torch.Tensor, dtype: str, bias: torch.Tensor | None = None) -> PackedLinear:
    layer = PackedLinear(*weight.shape, dtype)
    layer.fill(0, weight.shape[0], weight.data_ptr(), weight.stride(0), name_of(weight))
    if bias is not None:
        layer.set_bias(bias.data_ptr(), name_of(bias))
    return layer


def name_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def forward(layer: PackedLinear, x: torch.Tensor, out_dtype: str, batch_invariant: bool = False) -> torch.Tensor:
    out = torch.empty(x.shape[0], layer.out_features, dtype=getattr(torch, out_dtype))
    layer.forward(x.data_ptr(), len(x), x.stride(0), out.data_ptr(), out.stride(0), out_dtype, batch_invariant)
    return out


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of the result, and of fp32 sums."""
    torch.testing.assert_close(actual.double(), expected, rtol=ROUNDING[name_of(actual)], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 17, 33, 130])
def test_forward_is_the_product_with_the_weights_plus_bias(level: str, dtype: str, num_rows: int) -> None:
    weight, bias = normal(75, 129, dtype=dtype), normal(75, dtype=dtype, seed=1)
    x = normal(num_rows, 129, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T + bias.double()
    layer = packed(weight, dtype, bias)
    assert_close(forward(layer, x, dtype), expected)
    assert_close(forward(layer, x, "float32"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_reads_and_writes_parts_of_wider_rows(level: str, dtype: str) -> None:
    weight = normal(48, 64, dtype=dtype)
    wide_x = normal(20, 100, dtype=dtype, seed=1)
    wide_out = torch.full((20, 80), 7.0, dtype=weight.dtype)
    x, out = wide_x[:, 10:74], wide_out[:, 16:64]
    packed(weight, dtype).forward(x.data_ptr(), 20, 100, out.data_ptr(), 80, dtype)
    assert_close(out, x.double() @ weight.double().T)
    assert (wide_out[:, :16] == 7).all()
    assert (wide_out[:, 64:] == 7).all()


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_any_dtype_are_merged_where_they_belong(dtype: str, source_dtype: str) -> None:
    parts = [normal(rows, 50, dtype=source_dtype, seed=rows) for rows in (33, 7, 1, 40)]
    layer = PackedLinear(81, 50, dtype)
    first = 0
    for part in parts:
        layer.fill(first, len(part), part.data_ptr(), part.stride(0), source_dtype)
        first += len(part)
    merged = torch.empty(60, 50, dtype=getattr(torch, dtype))
    layer.unpack(11, 60, merged.data_ptr())
    assert torch.equal(merged, torch.cat(parts)[11:71].to(merged.dtype))


def test_weights_that_were_not_filled_are_zero() -> None:
    layer = PackedLinear(20, 40, "bfloat16")
    weight = normal(10, 40, dtype="bfloat16")
    layer.fill(3, 10, weight.data_ptr(), 40, "bfloat16")
    out = forward(layer, normal(4, 40, dtype="bfloat16"), "bfloat16")
    assert (out[:, :3] == 0).all()
    assert (out[:, 13:] == 0).all()
    assert (out[:, 3:13] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(level: str, dtype: str) -> None:
    x = normal(70, 200, dtype=dtype, seed=1)
    layer = packed(normal(100, 200, dtype=dtype), dtype)
    together = forward(layer, x, dtype, batch_invariant=True)
    for num_rows in (1, 3, 16, 17, 40):
        first = 70 - num_rows
        assert torch.equal(forward(layer, x[first:], dtype, batch_invariant=True), together[first:])


def test_nan_in_one_row_stays_in_that_row(level: str) -> None:
    for num_rows in (3, 20):
        x = normal(num_rows, 70, dtype="bfloat16")
        x[1, 3] = float("nan")
        out = forward(packed(normal(33, 70, dtype="bfloat16", seed=1), "bfloat16"), x, "bfloat16")
        assert out[1].isnan().all()
        assert not out[0].isnan().any()
        assert not out[2:].isnan().any()


def test_callers_on_several_threads_get_their_own_results() -> None:
    layer = packed(normal(300, 100, dtype="bfloat16"), "bfloat16")
    inputs = [normal(rows, 100, dtype="bfloat16", seed=rows) for rows in (1, 5, 20, 70)]
    expected = [forward(layer, x, "float32") for x in inputs]
    results: list[bool] = []

    def call(index: int) -> None:
        results.append(all(torch.equal(forward(layer, inputs[index], "float32"), expected[index]) for _ in range(20)))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_memory_is_that_of_the_weights_alone() -> None:
    layer = PackedLinear(2048, 1024, "bfloat16")
    assert (layer.out_features, layer.in_features) == (2048, 1024)
    assert layer.nbytes == 2048 * 1024 * 2


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"float64.*float32, bfloat16 or float16"):
        PackedLinear(4, 4, "float64")
    with pytest.raises(ValueError, match="out_features=0"):
        PackedLinear(0, 4, "float32")
    with pytest.raises(ValueError, match="in_features=-1"):
        PackedLinear(4, -1, "float32")
    layer = PackedLinear(4, 4, "bfloat16")
    x, out = torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"rows 3 to 5 .* 4"):
        layer.fill(3, 2, x.data_ptr(), 4, "bfloat16")
    with pytest.raises(ValueError, match="rows 0 to 5"):
        layer.unpack(0, 5, out.data_ptr())
    with pytest.raises(ValueError, match="out_dtype"):
        layer.forward(x.data_ptr(), 4, 4, out.data_ptr(), 4, "float16")
    with pytest.raises(ValueError, match="x_stride=3"):
        layer.forward(x.data_ptr(), 4, 3, out.data_ptr(), 4, "float32")
