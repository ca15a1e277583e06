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


def write_kv(
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_blocks: torch.Tensor,
    slot_offsets: torch.Tensor,
) -> None:
    """Store the step's `key` and `value` `[num_tokens, num_kv_heads, head_size]` in their slots."""
    kv_cache[slot_blocks, :, :, slot_offsets] = torch.stack((key, value), dim=1)


def gather_kv(kv_cache: torch.Tensor, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks of one request out as K and V, each `[num_kv_heads, len(block_ids) * block_size, head_size]`."""
    blocks = kv_cache[block_ids]
    num_blocks, _, num_kv_heads, block_size, head_size = blocks.shape
    kv = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, num_blocks * block_size, head_size)
    return kv[0], kv[1]


def gather_kv_padded(
    kv_cache: torch.Tensor, block_table: torch.Tensor, last_block: torch.Tensor, stale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks of several requests out, K and V each `[num_reqs, num_kv_heads, max_tokens, head_size]`.

    `block_table` `[num_reqs, max_blocks]` is padded with the null block; `last_block` `[num_reqs]` is the column of
    each request's last block, and `stale` `[num_reqs, 1, 1, block_size, 1]` marks its offsets beyond the request's end.
    """
    blocks = kv_cache[block_table]  # [num_reqs, max_blocks, 2, num_kv_heads, block_size, head_size]
    num_reqs, max_blocks, _, num_kv_heads, block_size, head_size = blocks.shape
    # A reused block may hold a NaN (from a load that failed) behind the request's end, and the NaN would survive the
    # mask: 0 * NaN = NaN.
    rows = torch.arange(num_reqs, device=blocks.device)
    blocks[rows, last_block] = blocks[rows, last_block].masked_fill(stale, 0)
    kv = blocks.permute(2, 0, 3, 1, 4, 5).reshape(2, num_reqs, num_kv_heads, max_blocks * block_size, head_size)
    return kv[0], kv[1]
