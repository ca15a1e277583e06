"""The running requests as rows of persistent arrays. Mirrors vllm/v1/worker/gpu_input_batch.py.

Rows are dense: when one leaves, the last row moves into its place. A row may sit out a step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from folovllm.sample.logits_processor.interface import LogitsState, ProcessedRow
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sampling_params import SamplingParams
from folovllm.worker.prompt_logprobs import PromptLogprobs

Rows = npt.NDArray[np.int64]

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


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
    logits_state: LogitsState | None = None
    """There when some logits processor works on it."""
    prompt_logprobs: PromptLogprobs | None = None
    """There when it asks for them."""

    @property
    def num_logprobs(self) -> int:
        """How many of the most likely tokens to report with each output token; -1: nothing."""
        number = self.sampling_params.logprobs
        return -1 if number is None else number


class InputBatch:
    """Rows of arrays; every array has the row as its first axis. Owned by the model runner's thread."""

    def __init__(self, max_num_reqs: int, max_model_len: int, block_size: int) -> None:
        self.req_ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.states: list[CachedRequestState] = []
        """By row."""
        # Rows with the rarer options: without any a step skips what they need.
        self.num_processed = 0
        self.num_with_prompt_logprobs = 0
        self._num_min_p = self._num_with_logprobs = self._num_min_tokens = self._num_random = 0
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
        self.min_p = np.zeros(max_num_reqs, dtype=np.float32)
        self.num_logprobs = np.zeros(max_num_reqs, dtype=np.int64)
        self.min_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.seeds = np.zeros(max_num_reqs, dtype=np.uint64)
        self._arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]
        # Of the last step, until a request comes or goes: decode steps ask for the same again and again.
        self._scheduled: list[str] = []
        self._scheduled_rows: Rows = _NO_ROWS
        self._sampling: tuple[Rows, SamplingMetadata] | None = None

    def add(
        self, state: CachedRequestState, token_ids: list[int], block_ids: list[int], num_computed_tokens: int
    ) -> None:
        """Give the request a row. REQUIRES: it has none, and fewer than max_num_reqs rows are taken."""
        assert state.req_id not in self.row_of, f"request {state.req_id} has a row already"
        row = len(self.req_ids)
        assert row < len(self.num_tokens), "more running requests than max_num_seqs"
        self._forget_last_step()
        self.req_ids.append(state.req_id)
        self.row_of[state.req_id] = row
        self.states.append(state)
        self._count_options(state, 1)
        params = state.sampling_params
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_tokens[row] = len(token_ids)
        self.num_blocks[row] = 0
        self.num_prompt_tokens[row] = state.num_prompt_tokens
        self.num_computed_tokens[row] = num_computed_tokens
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.num_logprobs[row] = state.num_logprobs
        self.min_tokens[row] = params.min_tokens
        self.seeds[row] = state.seed
        self.append_blocks(row, block_ids)
        if state.logits_state is not None:
            state.logits_state.sync(token_ids[state.num_prompt_tokens :])

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
        self._forget_last_step()
        self._count_options(self.states[row], -1)
        last_req_id, last_state = self.req_ids.pop(), self.states.pop()
        last = len(self.req_ids)
        if row == last:
            return
        self.req_ids[row], self.states[row] = last_req_id, last_state
        self.row_of[last_req_id] = row
        num_tokens, num_blocks = int(self.num_tokens[last]), int(self.num_blocks[last])
        self.token_ids[row, :num_tokens] = self.token_ids[last, :num_tokens]
        self.block_table[row, :num_blocks] = self.block_table[last, :num_blocks]
        for array in self._arrays:
            if array.ndim == 1:
                array[row] = array[last]

    def rows_of(self, req_ids: Iterable[str]) -> Rows:
        """The rows of these requests, in their order; the same array while nothing changes."""
        scheduled = list(req_ids)
        if scheduled != self._scheduled:
            self._scheduled = scheduled
            self._scheduled_rows = np.array([self.row_of[req_id] for req_id in scheduled], dtype=np.int64)
        return self._scheduled_rows

    def append_tokens(self, rows: Rows, token_ids: npt.NDArray[np.int64]) -> None:
        """Add one sampled token to each of `rows`."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1
        if self.num_processed:
            for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if (state := self.states[row].logits_state) is not None:
                    state.append(token_id)

    def sampling_metadata(self, rows: Rows) -> SamplingMetadata:
        """The options of the rows that sample in this step, in their order."""
        if self._sampling is not None and self._sampling[0] is rows:
            options = self._sampling[1]
            if self._is_plain_greedy:
                return options
        else:
            options = self._sampling_options(rows)
            self._sampling = rows, options
        positions = self.num_tokens[rows] - self.num_prompt_tokens[rows]
        masked_rows, masked_token_ids = self._masked(rows, positions) if self._num_min_tokens else (_NO_ROWS, _NO_ROWS)
        return SamplingMetadata(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seeds=options.seeds,
            output_positions=positions,
            masked_rows=masked_rows,
            masked_token_ids=masked_token_ids,
            min_p=options.min_p,
            processed=self._processed(rows) if self.num_processed else (),
            num_logprobs=options.num_logprobs,
        )

    @property
    def _is_plain_greedy(self) -> bool:
        """Whether nothing that a step's sampling does depends on where its rows are in their outputs."""
        return not (self._num_random or self._num_min_tokens or self.num_processed)

    def _sampling_options(self, rows: Rows) -> SamplingMetadata:
        """What stays the same from step to step."""
        return SamplingMetadata(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            seeds=self.seeds[rows],
            output_positions=self.num_tokens[rows] - self.num_prompt_tokens[rows],
            masked_rows=_NO_ROWS,
            masked_token_ids=_NO_ROWS,
            min_p=self.min_p[rows] if self._num_min_p else None,
            num_logprobs=self._wanted_logprobs(rows) if self._num_with_logprobs else None,
        )

    def _masked(self, rows: Rows, positions: Rows) -> tuple[Rows, Rows]:
        """Pairs of (index into `rows`, token) that may not be drawn yet."""
        masked = np.flatnonzero(positions < self.min_tokens[rows])
        ids = [self.states[rows[i]].masked_token_ids for i in masked]
        return (np.repeat(masked, [len(x) for x in ids]), np.concatenate(ids)) if ids else (_NO_ROWS, _NO_ROWS)

    def _processed(self, rows: Rows) -> list[ProcessedRow]:
        processed = []
        for index, row in enumerate(rows.tolist()):
            state = self.states[row].logits_state
            if state is not None:
                output = self.token_ids[row, self.num_prompt_tokens[row] : self.num_tokens[row]]
                processed.append(ProcessedRow(index, state, output))
        return processed

    def _wanted_logprobs(self, rows: Rows) -> npt.NDArray[np.int64] | None:
        wanted = self.num_logprobs[rows]
        return wanted if (wanted >= 0).any() else None

    def _count_options(self, state: CachedRequestState, change: int) -> None:
        self.num_processed += change * (state.logits_state is not None)
        self.num_with_prompt_logprobs += change * (state.prompt_logprobs is not None)
        self._num_min_p += change * (state.sampling_params.min_p > 0.0)
        self._num_with_logprobs += change * (state.num_logprobs >= 0)
        self._num_min_tokens += change * (state.sampling_params.min_tokens > 0)
        self._num_random += change * (not state.sampling_params.is_greedy)

    def _forget_last_step(self) -> None:
        self._scheduled, self._sampling = [], None
