"""Presence, frequency and repetition penalties. Mirrors vllm/v1/sample/ops/penalties.py.

vLLM counts over the whole vocabulary in each step. Here a request counts its own tokens as they come, and only the
logits of these are read and written.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from folovllm.sample.ops.staging import to_device

_FIRST_CAPACITY = 64


class TokenCounts:
    """The distinct tokens of one request, and how often each was generated; 0 for those of the prompt alone.

    token_ids   | prompt, distinct | output, not in the prompt, in order of appearance | unused |
    counts      |  >= 0            |  >= 1                                              |        |
    """

    def __init__(self, prompt_token_ids: Sequence[int] = ()) -> None:
        """Count from here on; `prompt_token_ids` are the ones to be penalised although they were not generated."""
        prompt = list(dict.fromkeys(prompt_token_ids))
        self._num_prompt = len(prompt)
        self._index = {token: i for i, token in enumerate(prompt)}
        self._token_ids = np.zeros(max(_FIRST_CAPACITY, 2 * len(prompt)), dtype=np.int64)
        self._token_ids[: len(prompt)] = prompt
        self._counts = np.zeros(len(self._token_ids), dtype=np.float32)
        self._output: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """`[len(self)]`, each once; a view."""
        return self._token_ids[: len(self._index)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """`[len(self)]`, how often each was generated; a view."""
        return self._counts[: len(self._index)]

    def append(self, token_id: int) -> None:
        """Count one generated token."""
        self._output.append(token_id)
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[index] = token_id
        self._counts[index] += 1

    def sync(self, output_token_ids: Sequence[int]) -> None:
        """Count these and no others."""
        if self._output == list(output_token_ids):
            return
        for token_id in list(self._index)[self._num_prompt :]:
            del self._index[token_id]
        self._counts[:] = 0
        self._output = []
        for token_id in output_token_ids:
            self.append(token_id)


def apply_penalties(
    logits: torch.Tensor,
    rows: npt.NDArray[np.int64],
    counts: Sequence[TokenCounts],
    penalties: npt.NDArray[np.float32],
) -> None:
    """Penalise in place.

    Args:
        logits: `[num_rows, vocab_size]` fp32.
        rows: `[n]`, the rows to change.
        counts: the tokens of each.
        penalties: `[n, 3]`: repetition, frequency and presence penalty of each.
    """
    lengths = [len(c) for c in counts]
    row_index = np.repeat(rows, lengths)
    token_ids = np.concatenate([c.token_ids for c in counts])
    number = np.concatenate([c.counts for c in counts])
    repetition, frequency, presence = np.repeat(penalties, lengths, axis=0).T
    device = logits.device
    where = (to_device(row_index, device), to_device(token_ids, device))
    scale = to_device(repetition.copy(), device)
    minus = to_device(frequency * number + presence * (number > 0), device)
    values = logits[where]
    logits[where] = torch.where(values > 0, values / scale, values * scale) - minus
