"""The reference backend: attention written as its formula, one request after the other. Slow, and easy to check."""

import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.ops import block_rows, gather_kv


class TorchNaiveBackend(AttentionBackend):
    """softmax(Q K^T * scale + causal mask) V per request, the softmax in fp32."""

    name = "torch_naive"

    @classmethod
    def supports(cls, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
        """Everywhere."""
        return True

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Attend request by request."""
        output = torch.empty_like(query)
        starts = metadata.query_start_loc_cpu
        for i, seq_len in enumerate(metadata.seq_lens_cpu.tolist()):
            start, end = int(starts[i]), int(starts[i + 1])
            num_blocks = -(-seq_len // self.block_size)
            key, value = gather_kv(
                kv_cache, block_rows(metadata.block_tables[i : i + 1, :num_blocks], self.num_kv_heads)
            )
            output[start:end] = self._attend(query[start:end], key[0, :, :seq_len], value[0, :, :seq_len])
        return output

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query_len, seq_len = query.shape[0], key.shape[1]
        group = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
        scores = torch.matmul(query.transpose(0, 1), key.transpose(1, 2)) * self.scale
        # The query rows are the last ones of the sequence: row r sees the keys [0, seq_len - query_len + r].
        visible = torch.ones(query_len, seq_len, dtype=torch.bool, device=query.device).tril(seq_len - query_len)
        scores = scores.masked_fill(~visible, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value).transpose(0, 1)
