"""The operations in Triton against torch's: on a GPU, or without one in Triton's interpreter."""

import os

import pytest
import torch

from folovllm.ops.abstract import HeadLayout
from folovllm.ops.torch_ops import TorchOps

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or Triton's interpreter"
    ),
]
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(dtype: torch.dtype) -> tuple[TorchOps, TorchOps]:
    from folovllm.ops.triton_ops import TritonOps

    return TritonOps(dtype), TorchOps(dtype)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the order of a sum, and so for the last place."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96])
def test_norms(dtype, size):
    triton_ops, torch_ops = both(dtype)
    apart = random(3, size + 32, dtype=dtype)[:, :size]
    weight, residual = random(size, dtype=dtype), random(3, size, dtype=dtype)
    assert_same(triton_ops.rms_norm(apart, weight, 1e-6), torch_ops.rms_norm(apart, weight, 1e-6))
    own, reference = residual.clone(), residual.clone()
    assert_same(
        triton_ops.add_rms_norm(apart, own, weight, 1e-6), torch_ops.add_rms_norm(apart, reference, weight, 1e-6)
    )
    assert_same(own, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [40, 1500])
def test_silu_mul(dtype, size):
    triton_ops, torch_ops = both(dtype)
    gate_up = random(3, 2 * size, dtype=dtype)
    assert_same(triton_ops.silu_mul(gate_up), torch_ops.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [True, False], ids=["qk norm", "no norm"])
@pytest.mark.parametrize("head_size", [32, 24])
def test_rotate_and_write(dtype, has_norm, head_size):
    triton_ops, torch_ops = both(dtype)
    norm = [random(head_size + i, dtype=dtype)[:head_size] if has_norm else None for i in range(2)]
    layout = HeadLayout(4, 2, head_size, 8, random(50, head_size, dtype=dtype), *norm, eps=1e-6)
    qkv = random(5, 8 * head_size, dtype=dtype)
    positions = torch.tensor([0, 7, 49, 3, 3], device=DEVICE)
    slots = torch.tensor([8, 15, 40, 17, 30], device=DEVICE)
    metadata = type("Metadata", (), {"slot_mapping": slots, "slot_blocks": slots // 8, "slot_offsets": slots % 8})
    caches = [torch.zeros(7, 2, 2, 8, head_size, dtype=dtype, device=DEVICE) for _ in range(2)]
    queries = [
        ops.rotate_and_write(layout, qkv, ops.prepare_rotation(layout.cos_sin, positions), cache, metadata)
        for ops, cache in zip((triton_ops, torch_ops), caches, strict=True)
    ]
    assert_same(*queries)
    assert_same(*caches)
    # Padding is not written.
    before = caches[0].clone()
    metadata.slot_mapping = torch.full((5,), -1, device=DEVICE)
    triton_ops.rotate_and_write(layout, random(5, 8 * head_size, dtype=dtype), positions, caches[0], metadata)
    assert torch.equal(caches[0], before)
