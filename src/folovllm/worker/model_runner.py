"""Runs one step: scheduler output -> input tensors -> model -> sampled tokens.

Mirrors vllm/v1/worker/gpu_model_runner.py.
The same code serves CPU and CUDA. A step reads the device back once, for the sampled tokens.
"""

import logging

import torch

from folovllm.attention.selector import select_backend
from folovllm.config import EngineConfig
from folovllm.core.kv_connector import KVConnector
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.loader import load_model
from folovllm.model_executor.parallel import SINGLE, TensorParallel
from folovllm.model_executor.recorded_forward import Forward, record_forward
from folovllm.worker import kv_memory
from folovllm.worker.connector_step import run_with_connector
from folovllm.worker.input_batch import CachedRequestState, InputBatch
from folovllm.worker.kv_cache_sizing import size_kv_cache
from folovllm.worker.sampling_step import SamplingStep
from folovllm.worker.step_inputs import InputPreparer, StepInputs

logger = logging.getLogger(__name__)


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
        if config.cache_config.num_kv_blocks == 0:
            config = self.config = size_kv_cache(config, self.model, self.backend, tensor_parallel)
            model_config = config.model_config
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
        self.inputs = InputPreparer(self.input_batch, self.backend, limits.max_num_batched_tokens, self.device)
        logger.info("runner ready device=%s backend=%s num_kv_blocks=%d", self.device, self.backend.name, shape[0])

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step.

        A request whose prefill stays partial samples nothing. Neither does one whose blocks the connector reports as
        invalid in this step: the scheduler recomputes it from the first such block.
        """
        self._update_states(scheduler_output)
        step = self.inputs.prepare(scheduler_output) if scheduler_output.total_num_scheduled_tokens else None
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

    def _forward(self, step: StepInputs, context: ForwardContext) -> torch.Tensor:
        self.inputs.copies_given()
        return self.compute(step.input_ids, step.positions, context)

    def _sample(self, step: StepInputs, hidden: torch.Tensor, invalid_block_ids: set[int]) -> ModelRunnerOutput:
        starts = step.attn_metadata.query_start_loc_cpu
        return self.sampling.run(hidden, step.rows, starts, step.samples, step.logits_indices, invalid_block_ids)
