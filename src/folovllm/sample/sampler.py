"""Logits to one token per row. Mirrors vllm/v1/sample/sampler.py.

raw logits -> fp32 -> allowed ids, grammar -> min_tokens -> bad words -> logit bias -> penalties
           |          -> greedy rows: argmax
           |          -> other rows: temperature -> min_p -> top-k -> top-p -> draw
           '-> log-probabilities
"""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from folovllm.engine.messages import LogprobsLists
from folovllm.sample.logits_processor.builtin import AUTHORITIES, OTHERS, mask
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops import native
from folovllm.sample.ops.logprobs import gather_logprobs_by_row
from folovllm.sample.ops.staging import to_device
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
        asking = np.flatnonzero(metadata.num_logprobs >= 0)
        index = to_device(asking, logits.device)
        raw = logits[index]  # a copy
        tokens = self.sample(logits, metadata)
        reports = gather_logprobs_by_row(raw, tokens[index], metadata.num_logprobs[asking])
        return SamplerOutput(tokens, {int(asking[i]): report for i, report in reports.items()})

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Choose.

        Returns:
            `[num_rows]` int64 token ids, on the device of `logits`.
        """
        if metadata.processed or len(metadata.masked_rows):
            logits = logits.float()
            self._process(logits, metadata)
        is_greedy = metadata.temperature < GREEDY_EPSILON
        if is_greedy.all():
            return _argmax(logits)
        random = np.flatnonzero(~is_greedy)
        if len(random) == len(logits):
            return self._draw(logits, metadata, random)
        if native.has_contiguous_rows(logits):  # one pass over all rows where they lie
            return self._draw(logits, _greedy_as_top_1(metadata, is_greedy), np.arange(len(logits)))
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        greedy = to_device(np.flatnonzero(is_greedy), logits.device)
        tokens[greedy] = _argmax(logits[greedy])
        index = to_device(random, logits.device)
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
        uniform = uniforms(metadata.seeds[rows], metadata.output_positions[rows])
        min_p = None if metadata.min_p is None else metadata.min_p[rows]
        temperature = metadata.temperature[rows]
        return draw(logits.float(), metadata.top_k[rows], metadata.top_p[rows], uniform, min_p, temperature)


def _greedy_as_top_1(metadata: SamplingMetadata, is_greedy: npt.NDArray[np.bool_]) -> SamplingMetadata:
    """The same choice by a draw: the most likely token, the lowest id among equals."""
    return replace(
        metadata,
        temperature=np.where(is_greedy, np.float32(1.0), metadata.temperature),
        top_k=np.where(is_greedy, 1, metadata.top_k),
        top_p=np.where(is_greedy, np.float32(1.0), metadata.top_p),
        min_p=None if metadata.min_p is None else np.where(is_greedy, np.float32(0.0), metadata.min_p),
    )


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return native.argmax(logits) if native.has_contiguous_rows(logits) else logits.argmax(dim=-1)
