"""Logits to one token per row. Mirrors vllm/v1/sample/sampler.py.

Order: fp32 -> min_tokens mask -> greedy rows: argmax | other rows: temperature -> top-k -> top-p -> draw.
"""

import numpy as np
import torch

from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.topk_topp import draw
from folovllm.sample.random import uniforms
from folovllm.sampling_params import GREEDY_EPSILON


class Sampler:
    """Stateless: what a row gets depends on its logits, its options, its seed and its output position."""

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Choose.

        Args:
            logits: `[num_rows, vocab_size]`, any floating dtype; may be overwritten.
            metadata: the rows' options.

        Returns:
            `[num_rows]` int64 token ids, on the device of `logits`.
        """
        logits = logits.float()
        device = logits.device
        if len(metadata.masked_rows):
            rows, token_ids = (
                torch.from_numpy(a).to(device) for a in (metadata.masked_rows, metadata.masked_token_ids)
            )
            logits[rows, token_ids] = float("-inf")
        random = np.flatnonzero(metadata.temperature >= GREEDY_EPSILON)
        if len(random) == 0:
            return logits.argmax(dim=-1)
        if len(random) == len(logits):
            return self._draw(logits, metadata, random)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=device)
        greedy = torch.from_numpy(np.flatnonzero(metadata.temperature < GREEDY_EPSILON)).to(device)
        tokens[greedy] = logits[greedy].argmax(dim=-1)
        index = torch.from_numpy(random).to(device)
        tokens[index] = self._draw(logits[index], metadata, random)
        return tokens

    def _draw(self, logits: torch.Tensor, metadata: SamplingMetadata, rows: np.ndarray) -> torch.Tensor:
        temperature = torch.from_numpy(metadata.temperature[rows]).to(logits.device)
        uniform = uniforms(metadata.seeds[rows], metadata.output_positions[rows])
        return draw(logits.div_(temperature[:, None]), metadata.top_k[rows], metadata.top_p[rows], uniform)
