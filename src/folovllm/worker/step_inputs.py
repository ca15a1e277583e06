"""From what the scheduler decided to the tensors of one step.

See `_prepare_inputs` of vllm/v1/worker/gpu_model_runner.py.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from folovllm import _native
from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.core.sched.output import SchedulerOutput
from folovllm.worker.async_copy import CopyFence
from folovllm.worker.buffers import StagingBuffer
from folovllm.worker.input_batch import InputBatch, Rows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's tensors, and which rows of the batch they stand for."""

    rows: Rows
    """`[num_reqs]`: the batch row of each request in the step."""
    samples: Rows
    """Indices into `rows` of the requests that end the step with all their tokens computed: these sample."""
    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor | None
    """Query row of the last token of each request in `samples`; None: every token is one."""
    attn_metadata: AttentionMetadata


class InputPreparer:
    """Fills the same buffers in every step. Owned by the model runner, used by its thread."""

    def __init__(self, batch: InputBatch, backend: AttentionBackend, max_num_tokens: int, device: torch.device) -> None:
        def buffer(capacity: int, dtype: torch.dtype) -> StagingBuffer:
            return StagingBuffer(capacity, dtype, device)

        max_reqs = len(batch.num_tokens)
        self._batch, self._backend, self._block_size = batch, backend, backend.block_size
        self._is_on_host = device.type == "cpu"
        self._fence = CopyFence(device)
        self._input_ids = buffer(max_num_tokens, torch.int32)
        self._positions = buffer(max_num_tokens, torch.int64)
        self._slots = buffer(max_num_tokens, torch.int64)
        self._slot_blocks = buffer(max_num_tokens, torch.int64)
        self._slot_offsets = buffer(max_num_tokens, torch.int64)
        self._query_start_loc = buffer(max_reqs + 1, torch.int32)
        self._seq_lens = buffer(max_reqs, torch.int32)
        self._block_tables = buffer(batch.block_table.size, torch.int32)
        self._logits_indices = buffer(max_reqs, torch.int32)
        self._everyone: Rows = np.arange(max_reqs, dtype=np.int64)
        self._starts_of_one_each = np.arange(max_reqs + 1, dtype=np.int32)
        self._decodes = _native.DecodePreparer(
            token_ids=batch.token_ids,
            block_table=batch.block_table,
            num_tokens=batch.num_tokens,
            num_computed=batch.num_computed_tokens,
            block_size=self._block_size,
            input_ids=self._input_ids.array,
            positions=self._positions.array,
            slots=self._slots.array,
            slot_blocks=self._slot_blocks.array,
            slot_offsets=self._slot_offsets.array,
            seq_lens=self._seq_lens.array,
            block_tables=self._block_tables.array,
        )
        # Of the last step, if it was one of decodes: (rows, max_blocks) and its tensors.
        self._last_decodes: tuple[Rows, int, StepInputs] | None = None

    def prepare(self, scheduler_output: SchedulerOutput) -> StepInputs:
        """Lay the scheduled tokens of all requests end to end, and count them as computed.

        For requests with 2, 1 and 3 scheduled tokens of which 5, 9 and 0 were computed before:

            query_start_loc   0     2  3        6
            req_index       [ 0  0 | 1 | 2  2  2 ]
            positions       [ 5  6 | 9 | 0  1  2 ]
        """
        self._fence.wait()
        batch, scheduled = self._batch, scheduler_output.num_scheduled_tokens
        num_reqs, num_tokens = len(scheduled), scheduler_output.total_num_scheduled_tokens
        rows = batch.rows_of(scheduled)
        if num_tokens == num_reqs:
            return self._prepare_decodes(rows)
        self._last_decodes = None
        num_scheduled = np.fromiter(scheduled.values(), np.int64, num_reqs)
        query_start_loc = np.zeros(num_reqs + 1, dtype=np.int32)
        np.cumsum(num_scheduled, out=query_start_loc[1:])
        computed = batch.num_computed_tokens[rows]
        seq_lens = computed + num_scheduled
        batch.num_computed_tokens[rows] = seq_lens
        req_index = np.repeat(np.arange(num_reqs), num_scheduled)
        positions = np.arange(num_tokens) + (computed - query_start_loc[:-1])[req_index]
        token_rows = rows[req_index]

        slot_blocks = batch.block_table[token_rows, positions // self._block_size].astype(np.int64)
        slot_offsets = positions % self._block_size
        max_blocks = -(-int(seq_lens.max()) // self._block_size)
        samples = np.flatnonzero(seq_lens == batch.num_tokens[rows])
        metadata = AttentionMetadata(
            query_start_loc=self._query_start_loc.fill(query_start_loc),
            seq_lens=self._seq_lens.fill(seq_lens),
            block_tables=self._block_tables.fill(batch.block_table[rows, :max_blocks]),
            slot_mapping=self._slots.fill(slot_blocks * self._block_size + slot_offsets),
            slot_blocks=self._slot_blocks.fill(slot_blocks),
            slot_offsets=self._slot_offsets.fill(slot_offsets),
            query_start_loc_cpu=query_start_loc,
            seq_lens_cpu=seq_lens.astype(np.int32),
        )
        return StepInputs(
            rows=rows,
            samples=samples,
            input_ids=self._input_ids.fill(batch.token_ids[token_rows, positions]),
            positions=self._positions.fill(positions),
            logits_indices=self._logits_indices.fill(query_start_loc[1:][samples] - 1),
            attn_metadata=self._planned(metadata),
        )

    def copies_given(self) -> None:
        """All that `prepare` copies is on the device's stream."""
        self._fence.copies_given()

    def _prepare_decodes(self, rows: Rows) -> StepInputs:
        """A step of one token each, as most are."""
        num_reqs = len(rows)
        max_blocks, num_sampling = self._decodes.prepare(rows)
        if num_sampling < num_reqs:
            return self._decode_inputs(rows, max_blocks, self._indices_of_sampling(rows))
        last = self._last_decodes
        if last is not None and last[0] is rows and last[1] == max_blocks:
            return last[2]  # the same tensors, whose content is new
        inputs = self._decode_inputs(rows, max_blocks, self._everyone[:num_reqs])
        if self._is_on_host and not self._backend.plans_by_length:
            self._last_decodes = rows, max_blocks, inputs
        return inputs

    def _indices_of_sampling(self, rows: Rows) -> Rows:
        batch = self._batch
        return np.flatnonzero(batch.num_computed_tokens[rows] == batch.num_tokens[rows])

    def _decode_inputs(self, rows: Rows, max_blocks: int, samples: Rows) -> StepInputs:
        num_reqs = len(rows)
        starts = self._starts_of_one_each[: num_reqs + 1]
        metadata = AttentionMetadata(
            query_start_loc=self._query_start_loc.fill(starts),
            seq_lens=self._seq_lens.send(num_reqs),
            block_tables=self._block_tables.send(num_reqs, max_blocks),
            slot_mapping=self._slots.send(num_reqs),
            slot_blocks=self._slot_blocks.send(num_reqs),
            slot_offsets=self._slot_offsets.send(num_reqs),
            query_start_loc_cpu=starts,
            seq_lens_cpu=self._seq_lens.array[:num_reqs],
        )
        everyone_samples = len(samples) == num_reqs
        return StepInputs(
            rows=rows,
            samples=samples,
            input_ids=self._input_ids.send(num_reqs),
            positions=self._positions.send(num_reqs),
            logits_indices=None if everyone_samples else self._logits_indices.fill(samples),
            attn_metadata=self._planned(metadata),
        )

    def _planned(self, metadata: AttentionMetadata) -> AttentionMetadata:
        return replace(metadata, backend_plan=self._backend.plan(metadata))
