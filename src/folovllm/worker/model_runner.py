"""Runs one step: scheduler output -> input tensors -> model -> sampled tokens.

Mirrors vllm/v1/worker/gpu_model_runner.py.
The same code serves CPU and CUDA. A step reads the device back once, for the sampled tokens.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.selector import select_backend
from folovllm.config import EngineConfig
from folovllm.core.kv_connector import KVConnector
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.loader import load_model
from folovllm.model_executor.parallel import SINGLE, TensorParallel
from folovllm.model_executor.recorded_forward import Forward, record_forward
from folovllm.worker import kv_memory
from folovllm.worker.async_copy import CopyFence
from folovllm.worker.buffers import StagingBuffer
from folovllm.worker.connector_step import run_with_connector
from folovllm.worker.input_batch import CachedRequestState, InputBatch, Rows
from folovllm.worker.sampling_step import SamplingStep

logger = logging.getLogger(__name__)


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


class ModelRunner:
    """Owns the model, the KV cache and the rows. Used by one thread."""

    def __init__(self, config: EngineConfig, tensor_parallel: TensorParallel = SINGLE) -> None:
        self.config = config
        self.device = config.device
        self.block_size = config.cache_config.block_size
        model_config, parallel = config.model_config, config.parallel_config
        head_size = model_config.get_head_size()
        num_kv_heads = model_config.get_num_kv_heads(parallel)
        backend_class = select_backend(config.attention_backend, self.device, model_config.dtype, head_size)
        num_heads = model_config.get_num_attention_heads(parallel)
        self.backend = backend_class(num_heads, num_kv_heads, head_size, self.block_size, config.batch_invariant)
        self.model = load_model(config, self.backend, tensor_parallel)
        self.compute: Forward = self.model
        if not config.enforce_eager:
            self.compute = record_forward(self.model, self.backend, tensor_parallel)
        shape = (config.cache_config.num_kv_blocks, 2, num_kv_heads, self.block_size, head_size)
        # Zeros, not empty: masked attention still multiplies what it masks, and must not meet a NaN.
        self.kv_caches = {
            layer.layer_name: kv_memory.zeros(shape, model_config.dtype, self.device)
            for layer in self.model.attention_layers()
        }
        if self.device.type == "cpu":
            kv_memory.warn_if_scarce(sum(cache.nbytes for cache in self.kv_caches.values()))
        self.connector: KVConnector | None = None
        self.requests: dict[str, CachedRequestState] = {}
        limits = config.scheduler_config
        self.input_batch = InputBatch(limits.max_num_seqs, model_config.max_model_len, self.block_size)
        self.sampling = SamplingStep(config, self.model, self.input_batch)
        self._make_buffers(limits.max_num_seqs, limits.max_num_batched_tokens)
        logger.info("runner ready device=%s backend=%s num_kv_blocks=%d", self.device, self.backend.name, shape[0])

    def _make_buffers(self, max_reqs: int, max_tokens: int) -> None:
        def buffer(capacity: int, dtype: torch.dtype) -> StagingBuffer:
            return StagingBuffer(capacity, dtype, self.device)

        self._fence = CopyFence(self.device)
        self._input_ids = buffer(max_tokens, torch.int32)
        self._positions = buffer(max_tokens, torch.int64)
        self._slots = buffer(max_tokens, torch.int64)
        self._slot_blocks = buffer(max_tokens, torch.int64)
        self._slot_offsets = buffer(max_tokens, torch.int64)
        self._query_start_loc = buffer(max_reqs + 1, torch.int32)
        self._seq_lens = buffer(max_reqs, torch.int32)
        self._block_tables = buffer(self.input_batch.block_table.size, torch.int32)
        self._logits_indices = buffer(max_reqs, torch.int32)
        # 0, 1, 2, ...: where the tokens of requests begin that have one each, and the indices of all requests.
        self._starts_of_one_each = np.arange(max_reqs + 1, dtype=np.int32)
        self._everyone = np.arange(max_reqs, dtype=np.int64)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step.

        A request whose prefill stays partial samples nothing. Neither does one whose blocks the connector reports as
        invalid in this step: the scheduler recomputes it from the first such block.
        """
        self._update_states(scheduler_output)
        step = self._prepare_inputs(scheduler_output) if scheduler_output.total_num_scheduled_tokens else None
        context = ForwardContext(step.attn_metadata if step else None, self.kv_caches, self.connector)
        if self.connector is None:
            return self._sample(step, self._forward(step, context), set()) if step else ModelRunnerOutput({})
        hidden, report = run_with_connector(
            self.connector, scheduler_output, context, lambda: self._forward(step, context) if step else None
        )
        if step is None or hidden is None:
            return ModelRunnerOutput({}, report)
        output = self._sample(step, hidden, report.invalid_block_ids)
        output.kv_connector_output = report
        return output

    def _update_states(self, scheduler_output: SchedulerOutput) -> None:
        batch = self.input_batch
        for req_id in scheduler_output.finished_req_ids:
            batch.remove(req_id)
            self.requests.pop(req_id, None)
        for req_id in scheduler_output.preempted_req_ids:
            batch.remove(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            batch.remove(new.req_id)
            state = self.requests[new.req_id] = self.sampling.remember(new)
            batch.add(state, new.prompt_token_ids, new.block_ids, new.num_computed_tokens)
        for cached in scheduler_output.scheduled_cached_reqs:
            if cached.resumed_from_preemption:
                assert cached.all_token_ids is not None
                batch.remove(cached.req_id)
                state = self.requests[cached.req_id]
                batch.add(state, cached.all_token_ids, cached.block_ids, cached.num_computed_tokens)
            else:
                row = batch.row_of[cached.req_id]
                batch.num_computed_tokens[row] = cached.num_computed_tokens
                if cached.block_ids:
                    batch.append_blocks(row, cached.block_ids)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput) -> StepInputs:
        """Lay the scheduled tokens of all requests end to end.

        For requests with 2, 1 and 3 scheduled tokens of which 5, 9 and 0 were computed before:

            query_start_loc   0     2  3        6
            req_index       [ 0  0 | 1 | 2  2  2 ]
            positions       [ 5  6 | 9 | 0  1  2 ]
        """
        self._fence.wait()
        batch, scheduled = self.input_batch, scheduler_output.num_scheduled_tokens
        num_reqs, num_tokens = len(scheduled), scheduler_output.total_num_scheduled_tokens
        rows = batch.rows_of(scheduled)
        computed = batch.num_computed_tokens[rows]
        if num_tokens == num_reqs:  # one token each, as in most steps: no need to tell tokens from requests
            query_start_loc, token_rows, positions = self._starts_of_one_each[: num_reqs + 1], rows, computed
            seq_lens = computed + 1
        else:
            num_scheduled = np.fromiter(scheduled.values(), np.int64, num_reqs)
            query_start_loc = np.zeros(num_reqs + 1, dtype=np.int32)
            np.cumsum(num_scheduled, out=query_start_loc[1:])
            seq_lens = computed + num_scheduled
            req_index = np.repeat(np.arange(num_reqs), num_scheduled)
            positions = np.arange(num_tokens) + (computed - query_start_loc[:-1])[req_index]
            token_rows = rows[req_index]
        batch.num_computed_tokens[rows] = seq_lens

        slot_blocks = batch.block_table[token_rows, positions // self.block_size].astype(np.int64)
        slot_offsets = positions % self.block_size
        max_blocks = -(-int(seq_lens.max()) // self.block_size)
        is_known = seq_lens == batch.num_tokens[rows]
        samples = self._everyone[:num_reqs] if is_known.all() else np.flatnonzero(is_known)
        metadata = AttentionMetadata(
            query_start_loc=self._query_start_loc.fill(query_start_loc),
            seq_lens=self._seq_lens.fill(seq_lens),
            block_tables=self._block_tables.fill(batch.block_table[rows, :max_blocks]),
            slot_mapping=self._slots.fill(slot_blocks * self.block_size + slot_offsets),
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
            logits_indices=(
                None if len(samples) == num_tokens else self._logits_indices.fill(query_start_loc[1:][samples] - 1)
            ),
            attn_metadata=replace(metadata, backend_plan=self.backend.plan(metadata)),
        )

    def _forward(self, step: StepInputs, context: ForwardContext) -> torch.Tensor:
        self._fence.copies_given()
        return self.compute(step.input_ids, step.positions, context)

    def _sample(self, step: StepInputs, hidden: torch.Tensor, invalid_block_ids: set[int]) -> ModelRunnerOutput:
        starts = step.attn_metadata.query_start_loc_cpu
        return self.sampling.run(hidden, step.rows, starts, step.samples, step.logits_indices, invalid_block_ids)
