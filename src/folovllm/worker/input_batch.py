"""The running requests as rows of persistent arrays. Mirrors vllm/v1/worker/gpu_input_batch.py.

Rows are dense: when one leaves, the last row moves into its place. A row may sit out a step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from folovllm.sample.metadata import SamplingMetadata
from folovllm.sampling_params import SamplingParams

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CachedRequestState:
    """What the runner remembers of a request until it finishes, preempted or not."""

    req_id: str
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int
    """Its own, or one drawn from the engine's stream."""
    masked_token_ids: npt.NDArray[np.int64]
    """May not be drawn before `min_tokens`."""


class InputBatch:
    """Rows of arrays; every array has the row as its first axis. Owned by the model runner's thread."""

    def __init__(self, max_num_reqs: int, max_model_len: int, block_size: int) -> None:
        self.req_ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.masked_token_ids: list[npt.NDArray[np.int64]] = []
        # One more than the context: the last token may still be sampled there. Untouched pages cost nothing.
        self.token_ids = np.zeros((max_num_reqs, max_model_len + 1), dtype=np.int32)
        self.block_table = np.zeros((max_num_reqs, -(-max_model_len // block_size)), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_blocks = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_computed_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.temperature = np.zeros(max_num_reqs, dtype=np.float32)
        self.top_k = np.zeros(max_num_reqs, dtype=np.int64)
        self.top_p = np.ones(max_num_reqs, dtype=np.float32)
        self.min_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.seeds = np.zeros(max_num_reqs, dtype=np.uint64)
        self._arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]

    def add(
        self, state: CachedRequestState, token_ids: list[int], block_ids: list[int], num_computed_tokens: int
    ) -> None:
        """Give the request a row. REQUIRES: it has none, and fewer than max_num_reqs rows are taken."""
        assert state.req_id not in self.row_of, f"request {state.req_id} has a row already"
        row = len(self.req_ids)
        assert row < len(self.num_tokens), "more running requests than max_num_seqs"
        self.req_ids.append(state.req_id)
        self.row_of[state.req_id] = row
        self.masked_token_ids.append(state.masked_token_ids)
        params = state.sampling_params
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_tokens[row] = len(token_ids)
        self.num_blocks[row] = 0
        self.num_prompt_tokens[row] = state.num_prompt_tokens
        self.num_computed_tokens[row] = num_computed_tokens
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_tokens[row] = params.min_tokens
        self.seeds[row] = state.seed
        self.append_blocks(row, block_ids)

    def append_blocks(self, row: int, block_ids: list[int]) -> None:
        """Extend the row's block table."""
        start = int(self.num_blocks[row])
        self.block_table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks[row] = start + len(block_ids)

    def remove(self, req_id: str) -> None:
        """Drop the request's row, if it has one; the last row takes its place."""
        row = self.row_of.pop(req_id, None)
        if row is None:
            return
        last_req_id, last_masked = self.req_ids.pop(), self.masked_token_ids.pop()
        last = len(self.req_ids)
        if row == last:
            return
        self.req_ids[row], self.masked_token_ids[row] = last_req_id, last_masked
        self.row_of[last_req_id] = row
        num_tokens, num_blocks = int(self.num_tokens[last]), int(self.num_blocks[last])
        self.token_ids[row, :num_tokens] = self.token_ids[last, :num_tokens]
        self.block_table[row, :num_blocks] = self.block_table[last, :num_blocks]
        for array in self._arrays:
            if array.ndim == 1:
                array[row] = array[last]

    def append_tokens(self, rows: Rows, token_ids: npt.NDArray[np.int64]) -> None:
        """Add one sampled token to each of `rows`."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def sampling_metadata(self, rows: Rows) -> SamplingMetadata:
        """The options of the rows that sample in this step, in their order."""
        positions = self.num_tokens[rows] - self.num_prompt_tokens[rows]
        masked = np.flatnonzero(positions < self.min_tokens[rows])
        ids = [self.masked_token_ids[rows[i]] for i in masked]
        return SamplingMetadata(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            seeds=self.seeds[rows],
            output_positions=positions,
            masked_rows=np.repeat(masked, [len(x) for x in ids]) if ids else masked,
            masked_token_ids=np.concatenate(ids) if ids else masked,
        )
