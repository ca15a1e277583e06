"""Write the step's K and V to the paged cache, in Triton. See vllm's triton_reshape_and_cache_flash.py."""

# Triton has no type information, and its kernels take none.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: N803 - upper-case parameters are constants of the compilation.

import torch
import triton
import triton.language as tl


def write_kv(
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_blocks: torch.Tensor,
    slot_offsets: torch.Tensor,
) -> None:
    """As `attention.ops.write_kv`, but rows whose block is negative are not written: they pad a captured batch.

    Each tensor may have any strides but 1 along its last axis.
    """
    num_tokens, num_kv_heads, head_size = key.shape
    assert key.stride(2) == value.stride(2) == kv_cache.stride(4) == 1
    write_kv_kernel[(num_tokens,)](
        kv_cache,
        key,
        value,
        slot_blocks,
        slot_offsets,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        kv_cache.stride(3),
        NUM_KV_HEADS=num_kv_heads,
        HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        enable_fp_fusion=True,
    )


@triton.jit
def write_kv_kernel(
    kv_ptr,  # [num_blocks, 2, NUM_KV_HEADS, block_size, HEAD]
    key_ptr,  # [num_tokens, NUM_KV_HEADS, HEAD]
    value_ptr,  # [num_tokens, NUM_KV_HEADS, HEAD]
    slot_blocks,  # [num_tokens]
    slot_offsets,  # [num_tokens]
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_block,
    stride_kind,
    stride_kv_head,
    stride_slot,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """One token, all heads."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.load(slot_blocks + token).to(tl.int64)
    if block < 0:
        return
    heads = tl.arange(0, HEADS_PADDED)[:, None]
    dims = tl.arange(0, HEAD_PADDED)[None, :]
    mask = (heads < NUM_KV_HEADS) & (dims < HEAD)
    target = kv_ptr + block * stride_block + tl.load(slot_offsets + token) * stride_slot
    target += heads * stride_kv_head + dims
    key = tl.load(key_ptr + token * stride_key_token + heads * stride_key_head + dims, mask=mask)
    tl.store(target, key, mask=mask)
    value = tl.load(value_ptr + token * stride_value_token + heads * stride_value_head + dims, mask=mask)
    tl.store(target + stride_kind, value, mask=mask)
