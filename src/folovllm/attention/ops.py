"""Operations on the paged KV cache of one layer.

One block of one layer is contiguous, K and V together, so that a store moves it in one run:

    kv_cache[num_blocks, 2, num_kv_heads, block_size, head_size]
             |           |  |             |           `- elements of one head
             |           |  |             `- token within the block
             |           |  `- key/value heads of this rank
             |           `- 0 = K, 1 = V
             `- block id; block 0 is the null block: padding points at it, nothing is ever written to it

A *slot* is a token's place in the pool: slot = block_id * block_size + offset within the block.
"""

import torch

from folovllm.triton_support import has_triton


def write_kv(
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_blocks: torch.Tensor,
    slot_offsets: torch.Tensor,
) -> None:
    """Store the step's `key` and `value` `[num_tokens, num_kv_heads, head_size]` in their slots.

    On CUDA with Triton, rows whose block is negative are skipped; they pad a captured batch.
    """
    if kv_cache.is_cuda and has_triton():
        from folovllm.attention import triton_write

        triton_write.write_kv(kv_cache, key, value, slot_blocks, slot_offsets)
        return
    kv_cache[slot_blocks, :, :, slot_offsets] = torch.stack((key, value), dim=1)


def block_rows(block_table: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Where the blocks of several requests lie, seen as rows of `block_size * head_size` elements.

    Args:
        block_table: `[num_reqs, max_blocks]` block ids.
        num_kv_heads: of the cache.

    Returns:
        `[2, num_reqs, num_kv_heads, max_blocks]` int64: (block * 2 + K or V) * num_kv_heads + head. The order is that
        of the gathered K and V, so that gathering copies once.
    """
    device = block_table.device
    kind = torch.arange(2, device=device)[:, None, None, None]
    head = torch.arange(num_kv_heads, device=device)[:, None]
    return (block_table.long()[:, None, :] * 2 + kind) * num_kv_heads + head


def gather_kv(kv_cache: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks at `rows` (of `block_rows`) out as K and V.

    Each is `[num_reqs, num_kv_heads, max_blocks * block_size, head_size]`.
    """
    num_blocks, _, num_kv_heads, block_size, head_size = kv_cache.shape
    flat = kv_cache.view(num_blocks * 2 * num_kv_heads, block_size * head_size)
    # index_select copies whole rows: 4 to 5 times as fast as indexing by the block table and permuting.
    gathered = flat.index_select(0, rows.view(-1))
    key, value = gathered.view(2, rows.shape[1], num_kv_heads, -1, head_size)
    return key, value
