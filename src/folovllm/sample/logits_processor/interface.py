"""What a logits processor is, and what it keeps per request. Mirrors vllm/v1/sample/logits_processor/interface.py.

vLLM's processors hold the state of the whole batch and follow its rows as they move. Here the state belongs to the
request, which survives preemption and moves with its row; a processor is a function over the rows that use it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from folovllm.engine.messages import FinishReason
from folovllm.sample.ops.penalties import TokenCounts
from folovllm.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int64]


class TokenMatcher(Protocol):
    """Follows the output of one request and says what may come next."""

    end: FinishReason | None
    """Set once nothing more may come: "stop", or "error" when it cannot be followed any further."""

    def allowed_tokens(self) -> npt.NDArray[np.bool_] | None:
        """`[vocab_size]`: which tokens may come next; None when that is not known any more."""

    def append(self, token_id: int) -> None:
        """Follow one more token."""

    def sync(self, output_token_ids: Sequence[int]) -> None:
        """Make these the tokens followed so far."""


@dataclass(slots=True)
class LogitsState:
    """What the processors keep of one request, from its arrival to its end, preempted or not."""

    params: SamplingParams
    allowed_token_ids: TokenIds | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    bias_token_ids: TokenIds | None = None
    bias: npt.NDArray[np.float32] | None = None
    counts: TokenCounts | None = None
    """There when a penalty asks for it."""
    matcher: TokenMatcher | None = None

    @classmethod
    def create(
        cls,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        bad_words: tuple[tuple[int, ...], ...] = (),
        matcher: TokenMatcher | None = None,
    ) -> "LogitsState | None":
        """The state of a new request; None for one that no processor works on."""
        state = cls(params, bad_words=bad_words, matcher=matcher)
        if params.allowed_token_ids is not None:
            state.allowed_token_ids = np.unique(np.array(params.allowed_token_ids, dtype=np.int64))
        if params.logit_bias:
            state.bias_token_ids = np.array(list(params.logit_bias), dtype=np.int64)
            state.bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        if params.has_penalties:
            state.counts = TokenCounts(prompt_token_ids if params.repetition_penalty != 1.0 else ())
        used = (state.allowed_token_ids, state.bias, state.counts, state.matcher)
        return state if bad_words or any(part is not None for part in used) else None

    def append(self, token_id: int) -> None:
        """Take note of a token that became part of the output."""
        if self.counts is not None:
            self.counts.append(token_id)
        if self.matcher is not None:
            self.matcher.append(token_id)

    def sync(self, output_token_ids: Sequence[int]) -> None:
        """Make these the output tokens: after a preemption what was sampled last may not have been taken in."""
        if self.counts is not None:
            self.counts.sync(output_token_ids)
        if self.matcher is not None:
            self.matcher.sync(output_token_ids)


@dataclass(frozen=True, slots=True)
class ProcessedRow:
    """A row of logits that some processor works on."""

    index: int
    """Into the rows of logits."""
    state: LogitsState
    output_token_ids: npt.NDArray[np.int32]
    """A view of what was generated so far."""


class LogitsProcessor(ABC):
    """One option, over the rows of a step. Stateless: what a row gets depends on that row alone."""

    @abstractmethod
    def apply(self, logits: torch.Tensor, rows: Sequence[ProcessedRow]) -> None:
        """Change `logits` (`[num_rows, vocab_size]` fp32) in place, in the rows that use the option."""
