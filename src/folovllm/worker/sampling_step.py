"""From the hidden states of a step to its sampled tokens; what sampling keeps of each request.

See `_sample` and `_get_prompt_logprobs_dict` of vLLM's gpu_model_runner.py.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, NewRequestData
from folovllm.ops.abstract import Ops
from folovllm.sample.logits_processor.interface import LogitsState
from folovllm.sample.logits_processor.structured import GrammarCompiler
from folovllm.sample.sampler import Sampler
from folovllm.transformers_utils.tokenizer import Tokenizer
from folovllm.worker.async_copy import TokenReadback
from folovllm.worker.input_batch import CachedRequestState, InputBatch, Rows
from folovllm.worker.prompt_logprobs import PromptLogprobs


class LogitsModel(Protocol):
    """What sampling needs of a model."""

    ops: Ops

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden_size]` to `[n, vocab_size]`."""


class SamplingStep:
    """Owned by the model runner, used by its thread."""

    def __init__(self, config: EngineConfig, model: LogitsModel, batch: InputBatch) -> None:
        self._model = model
        self._batch = batch
        self._vocab_size = config.model_config.get_vocab_size()
        self._sampler = Sampler()
        self._readback = TokenReadback(config.scheduler_config.max_num_seqs, config.device)
        self._seed_stream = np.random.default_rng(config.model_config.seed)
        directory = Path(config.model_config.model)
        self._grammars = GrammarCompiler(lambda: Tokenizer.from_checkpoint(directory).backend, self._vocab_size)

    def remember(self, new: NewRequestData) -> CachedRequestState:
        """What the runner keeps of a new request."""
        params = new.sampling_params
        masked = np.unique(np.array([*new.eos_token_ids, *params.stop_token_ids], dtype=np.int64))
        matcher = None
        if new.grammar is not None:
            matcher = self._grammars.make_matcher(new.grammar, () if params.ignore_eos else new.eos_token_ids)
        wants_prompt = params.prompt_logprobs is not None
        return CachedRequestState(
            req_id=new.req_id,
            num_prompt_tokens=len(new.prompt_token_ids),
            sampling_params=params,
            seed=int(self._seed_stream.integers(2**63)) if params.seed is None else params.seed,
            masked_token_ids=masked[masked < self._vocab_size],
            logits_state=LogitsState.create(params, new.prompt_token_ids, new.bad_words_token_ids, matcher),
            prompt_logprobs=PromptLogprobs(new.prompt_token_ids, params.prompt_logprobs or 0) if wants_prompt else None,
        )

    def run(
        self,
        hidden: torch.Tensor,
        rows: Rows,
        query_start_loc: np.ndarray,
        samples: Rows,
        logits_indices: torch.Tensor | None,
        invalid_block_ids: set[int],
    ) -> ModelRunnerOutput:
        """Sample, append the tokens to their rows, and report.

        Args:
            hidden: `[num_tokens, hidden_size]`, of all the step's tokens.
            rows: `[num_reqs]`, the batch row of each request in the step.
            query_start_loc: `[num_reqs + 1]`, where the tokens of each begin.
            samples: indices into `rows` of the requests that sample.
            logits_indices: the last token of each of these; None: all tokens are.
            invalid_block_ids: rows that hold one of these blocks are not sampled.
        """
        batch = self._batch
        if batch.num_with_prompt_logprobs:
            self._add_prompt_chunks(hidden, rows, query_start_loc)
        if len(samples) == 0:
            return ModelRunnerOutput({})
        if len(samples) < len(rows):
            rows = rows[samples]
        if logits_indices is not None:
            hidden = self._model.ops.take_rows(hidden, logits_indices)
        logits = self._model.compute_logits(hidden)
        sampler_output = self._sampler(logits, batch.sampling_metadata(rows))
        self._readback.start(sampler_output.sampled_token_ids)
        req_ids = batch.req_ids
        logprobs = {req_ids[rows[i]]: report for i, report in sampler_output.logprobs.items()}
        tokens = self._readback.wait()
        if invalid_block_ids:
            valid = self._rows_without(rows, invalid_block_ids)
            rows, tokens = rows[valid], tokens[valid]
        batch.append_tokens(rows, tokens)
        output = ModelRunnerOutput(
            {req_ids[row]: [token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)}
        )
        output.logprobs = logprobs
        if batch.num_processed or batch.num_with_prompt_logprobs:
            self._report_ends(output, rows)
        return output

    def _add_prompt_chunks(self, hidden: torch.Tensor, rows: Rows, query_start_loc: np.ndarray) -> None:
        for index, row in enumerate(rows.tolist()):
            wanted = self._batch.states[row].prompt_logprobs
            if wanted is not None and not wanted.is_reported:
                chunk = hidden[int(query_start_loc[index]) : int(query_start_loc[index + 1])]
                start = int(self._batch.num_computed_tokens[row]) - len(chunk)
                wanted.add_chunk(start, chunk, self._model.compute_logits)

    def _report_ends(self, output: ModelRunnerOutput, rows: Rows) -> None:
        """Of the prompt, and of the grammar."""
        for row in rows.tolist():
            state = self._batch.states[row]
            wanted, logits_state = state.prompt_logprobs, state.logits_state
            if wanted is not None and not wanted.is_reported:
                output.prompt_logprobs[state.req_id] = wanted.take()
                wanted.is_reported = True
            matcher = logits_state.matcher if logits_state is not None else None
            if matcher is not None and matcher.end is not None:
                output.grammar_ends[state.req_id] = matcher.end

    def _rows_without(self, rows: Rows, invalid_block_ids: set[int]) -> Rows:
        """Indices into `rows` of the requests that hold none of the blocks."""
        batch = self._batch
        used = np.arange(batch.block_table.shape[1]) < batch.num_blocks[rows][:, None]
        hit = np.isin(batch.block_table[rows], list(invalid_block_ids)) & used
        return np.flatnonzero(~hit.any(axis=1))
