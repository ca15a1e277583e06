"""Paged attention in Triton: one launch serves prefill chunks and decodes alike.

Mirrors vllm/v1/attention/ops/triton_unified_attention.py.

    grid    query blocks  x  KV heads  x  splits of the keys
    tile    BLOCK_M rows = BLOCK_Q query rows of one request x the GROUP query heads that share the KV head
            TILE keys, gathered through the block table

K and V are read once for all query heads that share them. A batch too small to fill the card is split along its keys:
each split leaves its part of the result and the log2 of its softmax's denominator, and `reduce_splits_kernel` weighs
the parts. Nothing here waits for the device, and the grid depends on host numbers only, so a launch can be captured in
a CUDA graph: a request of length 0, which pads a captured batch, reads no block and yields zeros.
"""

# Triton has no type information, and its kernels take none.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
# ruff: noqa: N803 - upper-case parameters are constants of the compilation.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from folovllm.attention.backends.abstract import AttentionMetadata

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 64
_NUM_STAGES = 3
"""One ahead for a tile's keys and values, and one more for where its blocks are."""
_MIN_TILES_PER_SPLIT = 4
"""Fewer would not pay for the second kernel."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """The shape of a step's launch, the same for all layers."""

    is_decode: bool
    """Every request has one query row: request i is query block i, and nothing is searched."""
    block_m: int
    block_q: int
    tile: int
    num_query_blocks: int
    num_splits: int
    """A power of two."""
    num_warps: int


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What of a model the plan depends on."""

    group: int
    """Query heads that share a KV head."""
    num_kv_heads: int
    head_size: int
    itemsize: int
    """Bytes of an element."""


def padded_head_size(head_size: int) -> int:
    """What the tiles hold of a head: a power of two, at least the 16 of a matrix instruction."""
    return max(16, int(triton.next_power_of_2(head_size)))


def make_plan(
    shape: HeadShape, num_reqs: int, num_tokens: int, max_query_len: int, max_seq_len: int, num_sms: int
) -> LaunchPlan:
    """Decide a launch by host numbers only.

    Args:
        shape: of the model on this rank.
        num_reqs: requests of the step.
        num_tokens: their query rows.
        max_query_len: most query rows of one request.
        max_seq_len: most keys of one request.
        num_sms: multiprocessors of the card; the launch is split until it has a program for each.
    """
    is_decode = max_query_len <= 1
    is_wide = shape.itemsize > 2
    head = padded_head_size(shape.head_size)
    # K and V of a tile take 32 KiB of shared memory at most, for each stage of the pipeline.
    tile = max(16, min(64, 16384 // (head * shape.itemsize)))
    block_m = max(16, triton.next_power_of_2(shape.group * min(max_query_len, 128)))
    block_m = min(block_m, max(triton.next_power_of_2(shape.group), 32 if is_wide else 128 if head <= 128 else 64))
    block_q = 1 if is_decode else block_m // shape.group
    num_query_blocks = num_reqs if is_decode else num_tokens // block_q + num_reqs
    programs = max(1, num_query_blocks * shape.num_kv_heads)
    # A chunk does more work per key than a decode: fewer programs fill the card.
    num_splits = _choose_num_splits(programs, -(-max_seq_len // tile), 2 * num_sms if is_decode else num_sms)
    num_warps = 8 if block_m >= 128 or is_wide else 4
    return LaunchPlan(is_decode, block_m, block_q, tile, num_query_blocks, num_splits, num_warps)


def _choose_num_splits(programs: int, num_tiles: int, max_programs: int) -> int:
    """The largest power of two that leaves each split enough keys and makes no more than `max_programs`."""
    wanted = min(_MAX_SPLITS, max_programs // programs, num_tiles // _MIN_TILES_PER_SPLIT)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def unified_attention(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, plan: LaunchPlan, scale: float
) -> torch.Tensor:
    """Attend; the step's own K and V are in the cache already.

    Args:
        query: `[num_tokens, num_heads, head_size]`, any strides but 1 along `head_size`.
        kv_cache: `[num_blocks, 2, num_kv_heads, block_size, head_size]`, likewise.
        metadata: the step; its device tensors and the sizes of its arrays are used, its contents never read back.
        plan: of `make_plan`.
        scale: of the scores.

    Returns:
        `[num_tokens, num_heads, head_size]`.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    assert query.stride(2) == kv_cache.stride(4) == metadata.block_tables.stride(1) == 1
    output = torch.empty((num_tokens, num_heads, head_size), dtype=query.dtype, device=query.device)
    is_split = plan.num_splits > 1
    parts, logs = output, output
    if is_split:
        shape = (plan.num_splits, num_tokens, num_heads)
        parts = torch.empty((*shape, head_size), dtype=torch.float32, device=query.device)
        logs = torch.empty(shape, dtype=torch.float32, device=query.device)
    head_padded = padded_head_size(head_size)
    unified_attention_kernel[(plan.num_query_blocks, num_kv_heads, plan.num_splits)](
        query,
        kv_cache,
        parts,
        logs,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_tables,
        len(metadata.seq_lens),
        num_tokens,
        scale * _LOG2_E,
        query.stride(0),
        query.stride(1),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        kv_cache.stride(3),
        metadata.block_tables.stride(0),
        **kernel_constants(plan, num_heads, head_size, num_heads // num_kv_heads, block_size),
        num_warps=plan.num_warps,
        num_stages=_NUM_STAGES,
        enable_fp_fusion=True,
    )
    if is_split:
        reduce_splits_kernel[(num_tokens, num_heads)](
            parts,
            logs,
            output,
            num_tokens,
            num_heads,
            NUM_SPLITS=plan.num_splits,
            HEAD=head_size,
            HEAD_PADDED=head_padded,
            enable_fp_fusion=True,
        )
    return output


def kernel_constants(
    plan: LaunchPlan, num_heads: int, head_size: int, group: int, block_size: int
) -> dict[str, int | bool]:
    """What `unified_attention_kernel` is compiled for."""
    return {
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "HEAD": head_size,
        "HEAD_PADDED": padded_head_size(head_size),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": plan.block_m,
        "BLOCK_Q": plan.block_q,
        "TILE": plan.tile,
        "IS_DECODE": plan.is_decode,
        "IS_SPLIT": plan.num_splits > 1,
        # The interpreter multiplies no bf16.
        "WIDENS": not isinstance(unified_attention_kernel, triton.JITFunction),
    }


@triton.jit
def _find_request(query_start_loc, block, num_reqs, BLOCK_Q: tl.constexpr):
    """The request whose rows query block `block` holds.

    Request i owns the blocks from `query_start_loc[i] // BLOCK_Q + i` on: at least as many as it needs, so that where a
    request's blocks begin follows from one number. A block past its request's last row does nothing.
    """
    low = 0
    high = num_reqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _attend_tile(
    acc,
    row_max,
    row_sum,
    query,
    row_limit,
    tile_start,
    end,
    key_base,
    value_base,
    table,
    scale,
    stride_block,
    stride_slot,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDENS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take the keys `[tile_start, tile_start + TILE)` into the online softmax; base 2, in fp32.

    Masked: keys from `end` on are not read (what lies behind a request's end may be a NaN, and 0 * NaN = NaN), and row
    r sees the keys up to `row_limit[r]`.
    """
    keys = tile_start + tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_PADDED)
    if IS_MASKED:
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
    else:
        blocks = tl.load(table + keys // BLOCK_SIZE)
    offsets = blocks.to(tl.int64) * stride_block + (keys % BLOCK_SIZE) * stride_slot
    key_at = key_base + offsets[None, :] + dims[:, None]
    value_at = value_base + offsets[:, None] + dims[None, :]
    if IS_MASKED:
        key = tl.load(key_at, mask=(keys < end)[None, :] & (dims < HEAD)[:, None], other=0.0)
        value = tl.load(value_at, mask=(keys < end)[:, None] & (dims < HEAD)[None, :], other=0.0)
    elif HEAD == HEAD_PADDED:
        key = tl.load(key_at)
        value = tl.load(value_at)
    else:
        key = tl.load(key_at, mask=(dims < HEAD)[:, None], other=0.0)
        value = tl.load(value_at, mask=(dims < HEAD)[None, :], other=0.0)
    if WIDENS:
        key = key.to(tl.float32)
    # "ieee" concerns fp32 only: no TF32.
    scores = tl.dot(query, key, input_precision="ieee") * scale
    if IS_MASKED:
        scores = tl.where(keys[None, :] <= row_limit[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    finite_max = new_max
    if IS_MASKED:  # a row that has seen no key yet
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite_max[:, None])
    decay = tl.exp2(row_max - finite_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    weights = weights.to(value.dtype)
    if WIDENS:
        weights = weights.to(tl.float32)
        value = value.to(tl.float32)
    acc = tl.dot(weights, value, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum


# Not compiled anew for other numbers of requests, tokens and blocks.
@triton.jit(do_not_specialize=["num_reqs", "num_tokens", "stride_table"])
def unified_attention_kernel(
    query_ptr,  # [num_tokens, NUM_HEADS, HEAD]
    kv_ptr,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD]
    output_ptr,  # [num_tokens, NUM_HEADS, HEAD]; split: [num_splits, num_tokens, NUM_HEADS, HEAD] fp32
    logs_ptr,  # split: [num_splits, num_tokens, NUM_HEADS] fp32
    query_start_loc,  # [num_reqs + 1] int32
    seq_lens,  # [num_reqs] int32
    block_tables,  # [num_reqs, max_blocks] int32
    num_reqs,
    num_tokens,
    scale,  # of the scores, times log2(e)
    stride_query_token,
    stride_query_head,
    stride_block,
    stride_kind,
    stride_kv_head,
    stride_slot,
    stride_table,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    IS_DECODE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """One query block against one split of the keys of one KV head."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    if IS_DECODE:
        request = block
        start = block
        query_len = 1
        first = 0
    else:
        request = _find_request(query_start_loc, block, num_reqs, BLOCK_Q)
        start = tl.load(query_start_loc + request)
        query_len = tl.load(query_start_loc + request + 1) - start
        first = (block - (start // BLOCK_Q + request)) * BLOCK_Q
    if first >= query_len:
        return
    seq_len = tl.load(seq_lens + request)
    num_before = seq_len - query_len

    # Row m is query row first + m // GROUP of the request, head m % GROUP of the group.
    m = tl.arange(0, BLOCK_M)
    query_row = first + m // GROUP
    is_row = (m < BLOCK_Q * GROUP) & (query_row < query_len)
    token = (start + query_row).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    dims = tl.arange(0, HEAD_PADDED)
    is_element = is_row[:, None] & (dims < HEAD)[None, :]
    query_at = query_ptr + (token * stride_query_token + head * stride_query_head)[:, None] + dims[None, :]
    query = tl.load(query_at, mask=is_element, other=0.0)
    if WIDENS:
        query = query.to(tl.float32)
    row_limit = num_before + query_row

    # Tiles [0, num_full) are visible to all rows; [num_full, num_tiles) are masked.
    end = tl.minimum(seq_len, num_before + first + BLOCK_Q)
    num_tiles = tl.cdiv(end, TILE)
    num_full = (num_before + first + 1) // TILE
    low = 0
    high = num_tiles
    if IS_SPLIT:
        each = tl.cdiv(num_tiles, tl.num_programs(2))
        low = tl.program_id(2) * each
        high = tl.minimum(low + each, num_tiles)

    acc = tl.zeros([BLOCK_M, HEAD_PADDED], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    key_base = kv_ptr + kv_head.to(tl.int64) * stride_kv_head
    value_base = key_base + stride_kind
    table = block_tables + request.to(tl.int64) * stride_table
    for tile in range(low, tl.minimum(high, num_full)):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, row_limit, tile * TILE, end, key_base, value_base, table, scale,
            stride_block, stride_slot, HEAD, HEAD_PADDED, BLOCK_SIZE, TILE, WIDENS, False,
        )  # fmt: skip
    for tile in range(tl.maximum(low, num_full), high):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, row_limit, tile * TILE, end, key_base, value_base, table, scale,
            stride_block, stride_slot, HEAD, HEAD_PADDED, BLOCK_SIZE, TILE, WIDENS, True,
        )  # fmt: skip

    is_empty = row_sum == 0.0
    result = acc / tl.where(is_empty, 1.0, row_sum)[:, None]
    row = token * NUM_HEADS + head
    if IS_SPLIT:
        row += tl.program_id(2).to(tl.int64) * num_tokens * NUM_HEADS
        logs = tl.where(is_empty, float("-inf"), row_max + tl.log2(tl.where(is_empty, 1.0, row_sum)))
        tl.store(logs_ptr + row, logs, mask=is_row)
        is_element = is_element & (row_sum != 0.0)[:, None]  # nobody reads the rest
    result_at = output_ptr + row[:, None] * HEAD + dims[None, :]
    tl.store(result_at, result.to(output_ptr.dtype.element_ty), mask=is_element)


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_splits_kernel(
    parts_ptr,  # [NUM_SPLITS, num_tokens, num_heads, HEAD] fp32
    logs_ptr,  # [NUM_SPLITS, num_tokens, num_heads] fp32: log2 of each part's weight, -inf for none
    output_ptr,  # [num_tokens, num_heads, HEAD]
    num_tokens,
    num_heads,
    NUM_SPLITS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """The weighted mean of the splits' results, for one token and head; all splits are read at once."""
    row = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    dims = tl.arange(0, HEAD_PADDED)
    rows = tl.arange(0, NUM_SPLITS) * num_tokens * num_heads + row
    logs = tl.load(logs_ptr + rows)
    is_part = logs != float("-inf")
    largest = tl.max(logs, axis=0)
    weights = tl.where(is_part, tl.exp2(logs - tl.where(largest == float("-inf"), 0.0, largest)), 0.0)
    mask = is_part[:, None] & (dims < HEAD)[None, :]
    parts = tl.load(parts_ptr + rows[:, None] * HEAD + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + row * HEAD + dims, result.to(output_ptr.dtype.element_ty), mask=dims < HEAD)
