"""Log-probabilities of the tokens of a prompt, while it is computed in chunks. See vLLM's gpu_model_runner.py."""

from collections.abc import Callable

import torch

from folovllm.engine.messages import LogprobsLists
from folovllm.sample.ops.logprobs import gather_logprobs

_ROWS_AT_ONCE = 64  # of logits: a vocabulary of 151,936 makes 39 MB of them


class PromptLogprobs:
    """One request's, kept by position: a chunk that is computed again, after a preemption, replaces its own.

    prompt tokens     t0   t1   t2   t3
    hidden states     h0   h1   h2   h3     logits of h0 tell how likely t1 was
    reports           r1   r2   r3
    """

    def __init__(self, prompt_token_ids: list[int], num_logprobs: int) -> None:
        self._prompt = prompt_token_ids
        self._num_logprobs = num_logprobs
        self._token_ids: list[list[int]] = [[]] * (len(prompt_token_ids) - 1)
        self._logprobs: list[list[float]] = [[]] * (len(prompt_token_ids) - 1)
        self._ranks = [0] * (len(prompt_token_ids) - 1)
        self.is_reported = False
        """Set by the runner once it handed `take` on: later recomputations change nothing."""

    def add_chunk(
        self, start: int, hidden: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Take in the hidden states `[num_tokens, hidden_size]` of the tokens from position `start` on."""
        end = min(start + len(hidden), len(self._prompt) - 1)
        for first in range(start, end, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, end)
            logits = compute_logits(hidden[first - start : last - start])
            tokens = torch.tensor(self._prompt[first + 1 : last + 1], device=logits.device)
            report = gather_logprobs(logits, tokens, self._num_logprobs)
            self._token_ids[first:last] = report.logprob_token_ids
            self._logprobs[first:last] = report.logprobs
            self._ranks[first:last] = report.sampled_token_ranks

    def take(self) -> LogprobsLists:
        """All reports. REQUIRES: the whole prompt was computed."""
        assert all(self._ranks), "a position of the prompt was not computed"
        return LogprobsLists(self._token_ids, self._logprobs, self._ranks)
