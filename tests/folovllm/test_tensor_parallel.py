"""Two ranks give what one gives, and a rank that fails is reported."""

import gc
import os
import signal
from pathlib import Path

import pytest

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.llm import LLM
from folovllm.errors import ConfigError, EngineDeadError
from folovllm.sampling_params import SamplingParams

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], list(range(2, 40)), [7] * 17]


def generate(directory: Path, params: SamplingParams, **options: object) -> list[list[int]]:
    with LLM(
        str(directory), skip_tokenizer_init=True, num_kv_blocks=64, num_threads=1, dtype="float32", **options
    ) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


# tied and untied heads, biases on row-parallel layers, a vocabulary that two ranks share and one they do not,
# projections that the checkpoint fuses
@pytest.mark.parametrize("name", ["qwen3-wide-heads-gqa2", "llama-biases", "mistral-full", "phi3-gqa4-window"])
def test_two_ranks_generate_what_one_does(name, checkpoint):
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    directory = checkpoint(name)
    assert generate(directory, greedy, tensor_parallel_size=2) == generate(directory, greedy)


def test_seeded_sampling_and_several_steps_in_flight_are_the_same_on_two_ranks(checkpoint):
    directory = checkpoint("qwen3-wide-heads-gqa2")
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True)
    expected = generate(directory, params)
    assert generate(directory, params, tensor_parallel_size=2, async_scheduling=True) == expected


def test_a_dead_rank_ends_the_engine_with_a_reason(checkpoint):
    llm = LLM(
        str(checkpoint("qwen3-wide-heads-gqa2")),
        skip_tokenizer_init=True,
        num_kv_blocks=64,
        num_threads=1,
        tensor_parallel_size=2,
    )
    (rank,) = llm.llm_engine._client._core.executor._ranks
    os.kill(rank.process.pid, signal.SIGKILL)
    rank.process.wait()
    with pytest.raises(EngineDeadError, match="rank 1 ended with exit code -9"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=2))
    llm.shutdown()
    gc.collect()


def test_sizes_that_do_not_divide_the_heads_are_refused(checkpoint):
    args = EngineArgs(model=str(checkpoint("qwen3-gqa8-bias")), tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="does not divide the model's num_key_value_heads=1"):
        args.resolve()


@pytest.mark.parametrize("other", [{"kernels": "torch"}, {"attention_backend": "flash_attn"}])
def test_batch_invariance_is_refused_where_kernels_cannot_promise_it(other, checkpoint):
    directory = str(checkpoint("qwen3-gqa8-bias"))
    EngineArgs(model=directory, batch_invariant=True).resolve()
    with pytest.raises(ConfigError, match="batch_invariant=True needs the native kernels"):
        EngineArgs(model=directory, batch_invariant=True, **other).resolve()
