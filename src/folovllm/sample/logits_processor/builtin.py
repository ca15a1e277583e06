"""The options of SamplingParams that change logits. Mirrors vllm/v1/sample/logits_processor/builtin.py.

Masks come first, in falling order of authority: allowed ids and grammar (never both), then min_tokens, then bad words.
One of the latter two that would leave nothing to draw gives way in that row.
"""

from collections.abc import Sequence

import numpy as np
import torch

from folovllm.sample.logits_processor.interface import LogitsProcessor, ProcessedRow, TokenIds
from folovllm.sample.ops.penalties import apply_penalties
from folovllm.sample.ops.staging import to_device

MASKED = float("-inf")


class AllowedTokenIds(LogitsProcessor):
    """`allowed_token_ids`: everything else is masked."""

    def apply(self, logits: torch.Tensor, rows: Sequence[ProcessedRow]) -> None:
        """See `LogitsProcessor`."""
        for row in rows:
            if row.state.allowed_token_ids is not None:
                allowed = to_device(row.state.allowed_token_ids, logits.device)
                kept = logits[row.index, allowed]
                logits[row.index].fill_(MASKED)
                logits[row.index, allowed] = kept


class Grammars(LogitsProcessor):
    """`structured_outputs`: what the grammar does not allow is masked."""

    def apply(self, logits: torch.Tensor, rows: Sequence[ProcessedRow]) -> None:
        """See `LogitsProcessor`."""
        for row in rows:
            matcher = row.state.matcher
            if matcher is not None and (allowed := matcher.allowed_tokens()) is not None:
                refused = to_device(~allowed, logits.device)
                logits[row.index].masked_fill_(refused, MASKED)


class BadWords(LogitsProcessor):
    """`bad_words`: the last token of a word whose other tokens are the latest of the output is masked."""

    def apply(self, logits: torch.Tensor, rows: Sequence[ProcessedRow]) -> None:
        """See `LogitsProcessor`."""
        pairs = [
            (row.index, word[-1])
            for row in rows
            for word in row.state.bad_words
            if len(word) <= len(row.output_token_ids) + 1 and _ends_with(row.output_token_ids, word[:-1])
        ]
        if pairs:
            index, token_ids = np.array(pairs, dtype=np.int64).T
            mask(logits, index.copy(), token_ids.copy(), gives_way=index)


class LogitBias(LogitsProcessor):
    """`logit_bias`: added to the logits."""

    def apply(self, logits: torch.Tensor, rows: Sequence[ProcessedRow]) -> None:
        """See `LogitsProcessor`."""
        for row in rows:
            state = row.state
            if state.bias is not None and state.bias_token_ids is not None:
                where = to_device(state.bias_token_ids, logits.device)
                logits[row.index, where] += to_device(state.bias, logits.device)


class Penalties(LogitsProcessor):
    """`presence_penalty`, `frequency_penalty`, `repetition_penalty`."""

    def apply(self, logits: torch.Tensor, rows: Sequence[ProcessedRow]) -> None:
        """See `LogitsProcessor`."""
        penalised = [(row.index, row.state.counts, row.state.params) for row in rows if row.state.counts is not None]
        if penalised:
            values = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, _, p in penalised]
            index = np.array([index for index, _, _ in penalised], dtype=np.int64)
            apply_penalties(logits, index, [counts for _, counts, _ in penalised], np.array(values, dtype=np.float32))


AUTHORITIES: tuple[LogitsProcessor, ...] = (AllowedTokenIds(), Grammars())
"""What decides first which tokens there are."""
OTHERS: tuple[LogitsProcessor, ...] = (BadWords(), LogitBias(), Penalties())


def mask(logits: torch.Tensor, rows: TokenIds, token_ids: TokenIds, gives_way: TokenIds) -> None:
    """Mask the pairs (row, token) in place; in the rows `gives_way` only if something is left to draw then."""
    where = (to_device(rows, logits.device), to_device(token_ids, logits.device))
    if len(gives_way) == 0:
        logits[where] = MASKED
        return
    before = logits[where]
    logits[where] = MASKED
    checked = np.unique(gives_way)
    best = logits[to_device(checked, logits.device)].amax(dim=-1).cpu().numpy()
    for row in checked[best == MASKED]:
        pairs = to_device(np.flatnonzero(rows == row), logits.device)
        logits[int(row), where[1][pairs]] = before[pairs]


def _ends_with(output_token_ids: np.ndarray, tail: tuple[int, ...]) -> bool:
    return not tail or output_token_ids[-len(tail) :].tolist() == list(tail)
