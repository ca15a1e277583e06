"""torch's scaled_dot_product_attention (flash attention) over gathered blocks: where no paged kernel runs.

Mirrors vllm/v1/attention/backends/flash_attn.py.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.ops import block_rows, gather_kv


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes of similar length, gathered into one padded batch."""

    query_rows: torch.Tensor
    """`[num_reqs]`: the one query row of each."""
    rows: torch.Tensor
    """`[2, num_reqs, num_kv_heads, padded_blocks]`: their blocks, padded with the null block (ops.block_rows)."""
    stale: torch.Tensor
    """`[n]`: of the gathered K and V, seen as rows of `head_size`, those behind a request's end in its last block."""
    mask: torch.Tensor
    """`[num_reqs, 1, 1, padded_blocks * block_size]`: visible keys."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill chunk: several query rows of one request."""

    start: int
    end: int
    seq_len: int
    rows: torch.Tensor
    """`[2, 1, num_kv_heads, num_blocks]`: its blocks (ops.block_rows)."""
    mask: torch.Tensor | None
    """`[query_len, seq_len]` visible keys; None when the chunk is the whole sequence (plain causal)."""


@dataclass(frozen=True, slots=True)
class FlashAttnPlan:
    """The step, split by shape."""

    decode_groups: list[DecodeGroup]
    chunks: list[Chunk]


class FlashAttnBackend(AttentionBackend):
    """Chunks one by one with a bottom-right causal mask; decodes in padded batches.

    Query heads that share a KV head are laid along SDPA's query (decode) or head (chunk) axis, so K and V are never
    repeated.
    """

    name = "flash_attn"

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        """Everywhere torch runs."""
        return True

    def plan(self, metadata: AttentionMetadata) -> FlashAttnPlan:
        """Group the decodes by padded length and build the masks of the chunks."""
        starts, seq_lens = metadata.query_start_loc_cpu, metadata.seq_lens_cpu
        query_lens = np.diff(starts)
        padded = padded_num_blocks(-(-seq_lens // self.block_size))
        decodes = np.flatnonzero(query_lens == 1)
        groups = [
            self._decode_group(metadata, decodes[padded[decodes] == num_blocks], int(num_blocks))
            for num_blocks in np.unique(padded[decodes])
        ]
        chunks = [self._chunk(metadata, int(i)) for i in np.flatnonzero(query_lens > 1)]
        return FlashAttnPlan(groups, chunks)

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Attend the chunks, then the groups of decodes."""
        plan: FlashAttnPlan = metadata.backend_plan
        output = torch.empty_like(query)
        for chunk in plan.chunks:
            output[chunk.start : chunk.end] = self._attend_chunk(query[chunk.start : chunk.end], kv_cache, chunk)
        for group in plan.decode_groups:
            output[group.query_rows] = self._attend_decodes(query[group.query_rows], kv_cache, group)
        return output

    def _attend_chunk(self, query: torch.Tensor, kv_cache: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        # To [kv heads as batch, 1, tokens, head_size].
        key, value = (x.transpose(0, 1)[:, :, : chunk.seq_len] for x in gather_kv(kv_cache, chunk.rows))
        # [kv heads as batch, query heads of a group as heads, tokens, head_size]
        grouped = query.view(-1, self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_size)
        grouped = grouped.permute(1, 2, 0, 3)
        shape = (*grouped.shape[:2], chunk.seq_len, self.head_size)
        attended = F.scaled_dot_product_attention(
            grouped,
            key.expand(shape),
            value.expand(shape),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=self.scale,
        )
        return attended.permute(2, 0, 1, 3).reshape(query.shape)

    def _attend_decodes(self, query: torch.Tensor, kv_cache: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        key, value = gather_kv(kv_cache, group.rows)
        # A reused block may hold a NaN (from a load that failed) behind the request's end, and the NaN would survive
        # the mask: 0 * NaN = NaN.
        for gathered in (key, value):
            gathered.view(-1, self.head_size).index_fill_(0, group.stale, 0)
        # [requests, kv heads, query heads of a group as rows, head_size]
        grouped = query.view(-1, self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_size)
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=group.mask, scale=self.scale)
        return attended.reshape(query.shape)

    def _decode_group(self, metadata: AttentionMetadata, reqs: npt.NDArray[np.int64], num_blocks: int) -> DecodeGroup:
        device = metadata.block_tables.device
        seq_lens = metadata.seq_lens_cpu[reqs].astype(np.int64)[:, None]
        positions = np.arange(num_blocks * self.block_size)
        last_block_end = -(-seq_lens // self.block_size) * self.block_size
        behind_end = (positions >= seq_lens) & (positions < last_block_end)
        stale = np.flatnonzero(np.repeat(behind_end[:, None, :], self.num_kv_heads, axis=1))
        columns = torch.from_numpy(last_block_end // self.block_size).to(device)
        table = _take_blocks(metadata.block_tables, torch.from_numpy(reqs).to(device), num_blocks, columns)
        return DecodeGroup(
            query_rows=torch.from_numpy(metadata.query_start_loc_cpu[reqs].astype(np.int64)).to(device),
            rows=block_rows(table, self.num_kv_heads),
            stale=torch.from_numpy(stale).to(device),
            mask=torch.from_numpy(positions < seq_lens).to(device)[:, None, None, :],
        )

    def _chunk(self, metadata: AttentionMetadata, i: int) -> Chunk:
        start, end = (int(x) for x in metadata.query_start_loc_cpu[i : i + 2])
        seq_len, query_len = int(metadata.seq_lens_cpu[i]), end - start
        num_blocks = -(-seq_len // self.block_size)
        mask = None
        if query_len < seq_len:
            # Row r sees the keys [0, seq_len - query_len + r].
            device = metadata.block_tables.device
            mask = torch.ones(query_len, seq_len, dtype=torch.bool, device=device).tril(seq_len - query_len)
        rows = block_rows(metadata.block_tables[i : i + 1, :num_blocks], self.num_kv_heads)
        return Chunk(start, end, seq_len, rows, mask)


def padded_num_blocks(num_blocks: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Round up to 2^n or 1.5 * 2^n blocks, at least 4.

    The padded length follows from a request's own length only. So few groups arise, a third of a gather is padding at
    most (beyond 4 blocks), and the arithmetic of a request does not depend on its neighbours.
    """
    wanted = np.maximum(num_blocks, 4).astype(np.int64)
    power = np.left_shift(np.int64(1), np.ceil(np.log2(wanted)).astype(np.int64))
    return np.where(wanted <= power // 4 * 3, power // 4 * 3, power)


def _take_blocks(
    block_tables: torch.Tensor, rows: torch.Tensor, num_blocks: int, used_columns: torch.Tensor
) -> torch.Tensor:
    """`[len(rows), num_blocks]`, the null block from `used_columns` `[len(rows), 1]` on."""
    table = block_tables[rows, :num_blocks]
    table = F.pad(table, (0, num_blocks - table.shape[1]))
    return table.masked_fill(torch.arange(num_blocks, device=table.device) >= used_columns, 0)
