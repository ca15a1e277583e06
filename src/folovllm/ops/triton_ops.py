"""The operations on CUDA in Triton: one launch each, where torch takes five to ten.

Roundings are those of `TorchOps`: to the model's dtype after each step that torch would round after. The counterparts
in vLLM are csrc/layernorm_kernels.cu, activation_kernels.cu, pos_encoding_kernels.cu and cache_kernels.cu.
"""

# Triton has no type information, and its kernels take none.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: N803 - upper-case parameters are constants of the compilation.

from typing import Any

import torch
import triton
import triton.language as tl

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.ops.abstract import HeadLayout
from folovllm.ops.torch_ops import TorchOps

_SILU_BLOCK = 1024


class TritonOps(TorchOps):
    """Stateless. Tokens whose slot is negative pad a captured batch: their K and V are not written."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One pass; rows may lie apart."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch_norm(x, None, weight, out, eps)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One pass."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch_norm(x, residual, weight, out, eps)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """One pass."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
        grid = (num_rows, triton.cdiv(size, _SILU_BLOCK))
        silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=_SILU_BLOCK, enable_fp_fusion=True)
        return out

    def prepare_rotation(self, cos_sin: torch.Tensor, positions: torch.Tensor) -> Any:
        """The positions: the kernel looks the angles up."""
        return positions

    def rotate_and_write(
        self,
        layout: HeadLayout,
        qkv: torch.Tensor,
        rotation: Any,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """One pass over q, k and v."""
        num_tokens, head_size = len(qkv), layout.head_size
        assert qkv.stride(1) == kv_cache.stride(4) == 1
        query = torch.empty((num_tokens, layout.num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
        has_norm = layout.q_norm is not None and layout.k_norm is not None
        rotate_and_write_kernel[(num_tokens, layout.num_heads + 2 * layout.num_kv_heads)](
            qkv,
            query,
            kv_cache,
            layout.cos_sin,
            rotation,
            metadata.slot_mapping,
            layout.q_norm if has_norm else qkv,
            layout.k_norm if has_norm else qkv,
            layout.eps,
            qkv.stride(0),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.stride(2),
            kv_cache.stride(3),
            NUM_HEADS=layout.num_heads,
            NUM_KV_HEADS=layout.num_kv_heads,
            BLOCK_SIZE=layout.block_size,
            HALF=head_size // 2,
            HALF_PADDED=triton.next_power_of_2(head_size // 2),
            HAS_NORM=has_norm,
            num_warps=1,
            enable_fp_fusion=True,
        )
        return query


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    num_rows, size = x.shape
    assert x.stride(1) == 1
    assert residual is None or residual.is_contiguous()
    block = triton.next_power_of_2(size)
    rms_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=8 if block > 2048 else 4,
        enable_fp_fusion=True,
    )


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_rows, SIZE]
    residual_ptr,  # [num_rows, SIZE], contiguous
    weight_ptr,  # [SIZE]
    out_ptr,  # [num_rows, SIZE], contiguous
    stride_x,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(residual_ptr + row * SIZE + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    result = normed.to(dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * SIZE + columns, result.to(dtype), mask=mask)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, stride_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A stretch of one row of `gate | up`, each SIZE wide."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * stride_row + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_row + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, (silu * up).to(dtype), mask=mask)


@triton.jit
def _rotate(first, second, cos, sin, dtype: tl.constexpr):
    """Both halves of a head, in fp32, rounded as torch rounds each product."""
    low = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    high = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return low.to(dtype), high.to(dtype)


@triton.jit
def rotate_and_write_kernel(
    qkv_ptr,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]
    query_ptr,  # [num_tokens, NUM_HEADS, 2 * HALF], contiguous
    kv_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, 2 * HALF]
    cos_sin_ptr,  # [max_positions, 2 * HALF]
    positions,  # [num_tokens] int64
    slot_mapping,  # [num_tokens] int64
    q_norm_ptr,  # [2 * HALF]
    k_norm_ptr,  # [2 * HALF]
    eps,
    stride_qkv,
    stride_block,
    stride_kind,
    stride_kv_head,
    stride_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One head of one token: queries first, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, HALF_PADDED)
    mask = dims < HALF
    dtype = qkv_ptr.dtype.element_ty
    source = qkv_ptr + token * stride_qkv + head * 2 * HALF + dims
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    if head < NUM_HEADS + NUM_KV_HEADS:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / (2 * HALF) + eps)
            norm_ptr = k_norm_ptr + dims
            if head < NUM_HEADS:
                norm_ptr = q_norm_ptr + dims
            weight = tl.load(norm_ptr, mask=mask, other=0.0).to(tl.float32)
            a = ((a * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
            weight = tl.load(norm_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
            b = ((b * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        angles = cos_sin_ptr + tl.load(positions + token) * 2 * HALF + dims
        cos = tl.load(angles, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(angles + HALF, mask=mask, other=0.0).to(tl.float32)
        first, second = _rotate(a, b, cos, sin, dtype)
    if head < NUM_HEADS:
        target = query_ptr + (token * NUM_HEADS + head) * 2 * HALF + dims
        tl.store(target, first, mask=mask)
        tl.store(target + HALF, second, mask=mask)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
            kind = (head - NUM_HEADS) // NUM_KV_HEADS
            target = kv_ptr + (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * stride_slot
            target += kind * stride_kind + kv_head * stride_kv_head + dims
            tl.store(target, first, mask=mask)
            tl.store(target + HALF, second, mask=mask)
