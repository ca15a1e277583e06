"""Logits to one token per row. Mirrors vllm/v1/sample/sampler.py.

raw logits -> fp32 -> allowed ids, grammar -> min_tokens -> bad words -> logit bias -> penalties
           |          -> greedy rows: argmax
           |          -> other rows: temperature -> min_p -> top-k -> top-p -> draw
           '-> log-probabilities
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from folovllm.engine.messages import LogprobsLists
from folovllm.sample.logits_processor.builtin import AUTHORITIES, OTHERS, mask
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.logprobs import gather_logprobs_by_row
from folovllm.sample.ops.topk_topp import draw
from folovllm.sample.random import uniforms
from folovllm.sampling_params import GREEDY_EPSILON


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token per row of logits."""

    sampled_token_ids: torch.Tensor
    """`[num_rows]` int64, on the device of the logits."""
    logprobs: dict[int, LogprobsLists] = field(default_factory=dict)
    """Row -> report on its token, for the rows that ask."""


class Sampler:
    """Stateless: what a row gets depends on its logits, its options, its seed and its own tokens before."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Choose a token per row, and report the log-probabilities that are asked for.

        Args:
            logits: `[num_rows, vocab_size]`, any floating dtype; may be overwritten.
            metadata: the rows' options.
        """
        if metadata.num_logprobs is None:
            return SamplerOutput(self.sample(logits, metadata))
        raw_rows = torch.from_numpy(np.flatnonzero(metadata.num_logprobs >= 0)).to(logits.device)
        raw = logits[raw_rows]  # a copy
        tokens = self.sample(logits, metadata)
        numbers = metadata.num_logprobs[metadata.num_logprobs >= 0]
        reports = gather_logprobs_by_row(raw, tokens[raw_rows], numbers)
        rows = np.flatnonzero(metadata.num_logprobs >= 0).tolist()
        return SamplerOutput(tokens, {rows[i]: report for i, report in reports.items()})

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Choose.

        Returns:
            `[num_rows]` int64 token ids, on the device of `logits`.
        """
        logits = logits.float()
        if metadata.processed or len(metadata.masked_rows):
            self._process(logits, metadata)
        random = np.flatnonzero(metadata.temperature >= GREEDY_EPSILON)
        if len(random) == 0:
            return logits.argmax(dim=-1)
        if len(random) == len(logits):
            return self._draw(logits, metadata, random)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        greedy = torch.from_numpy(np.flatnonzero(metadata.temperature < GREEDY_EPSILON)).to(logits.device)
        tokens[greedy] = logits[greedy].argmax(dim=-1)
        index = torch.from_numpy(random).to(logits.device)
        tokens[index] = self._draw(logits[index], metadata, random)
        return tokens

    def _process(self, logits: torch.Tensor, metadata: SamplingMetadata) -> None:
        rows = metadata.processed
        for processor in AUTHORITIES if rows else ():
            processor.apply(logits, rows)
        if len(metadata.masked_rows):
            processed = np.array([row.index for row in rows], dtype=np.int64)
            gives_way = np.intersect1d(processed, metadata.masked_rows)
            mask(logits, metadata.masked_rows, metadata.masked_token_ids, gives_way)
        for processor in OTHERS if rows else ():
            processor.apply(logits, rows)

    def _draw(self, logits: torch.Tensor, metadata: SamplingMetadata, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        temperature = torch.from_numpy(metadata.temperature[rows]).to(logits.device)
        uniform = uniforms(metadata.seeds[rows], metadata.output_positions[rows])
        logits = logits.div_(temperature[:, None])
        if metadata.min_p is not None:
            _apply_min_p(logits, metadata.min_p[rows])
        return draw(logits, metadata.top_k[rows], metadata.top_p[rows], uniform)


def _apply_min_p(logits: torch.Tensor, min_p: npt.NDArray[np.float32]) -> None:
    """Mask what is less likely than `min_p` times the most likely token, in the rows that use it."""
    for row in np.flatnonzero(min_p > 0.0).tolist():
        least = logits[row].amax() + float(np.log(min_p[row]))
        logits[row].masked_fill_(logits[row] < least, float("-inf"))
