"""The engine core's greedy tokens equal those of transformers: alone, in mixed batches, preempted, cached, chunked."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tests.folovllm.checkpoints import SHAPES

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.messages import EngineCoreRequest
from folovllm.sampling_params import SamplingParams

BLOCK = 8
NUM_OUTPUT = 16
MIXED_LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 40, 57, 64]  # 1 to 3 blocks +- 1 token, and longer
# 16 requests need up to 10 blocks each, so a pool of 24 keeps only a few running at a time.
TINY_POOL = 25


def make_core(model: Any, **options: Any) -> EngineCore:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": BLOCK, "num_kv_blocks": 400}
    return EngineCore(EngineArgs(model=str(model), max_num_seqs=16, **{**defaults, **options}).resolve())


def run(core: EngineCore, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None) -> list[list[int]]:
    """Output tokens of each prompt, all submitted at once."""
    params = params or SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT)
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        core.add_request(EngineCoreRequest(request_id=str(i), prompt_token_ids=list(prompt), sampling_params=params))
        outputs[str(i)] = []
    while core.has_work:
        for output in core.step().outputs:
            outputs[output.request_id] += output.new_token_ids
            assert output.finish_reason in (None, "length")
    return list(outputs.values())


def prompts_of(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[list[int]]:
    return [random.Random(f"{length}-{seed}").choices(range(vocab), k=length) for length in lengths]


def num_preemptions(core: EngineCore) -> int:
    stats = core.step().scheduler_stats
    assert stats is not None
    return stats.num_preemptions


@pytest.fixture(params=sorted(SHAPES))
def shape(request):
    return SHAPES[request.param]


@pytest.fixture
def start(checkpoint):
    """start(shape name, **engine options) -> an engine core that is shut down after the test."""
    cores = []

    def make(name: str, **options: Any) -> EngineCore:
        cores.append(make_core(checkpoint(name), **options))
        return cores[-1]

    yield make
    for core in cores:
        core.shutdown()


def test_requests_alone_match_transformers(shape, start, reference):
    core = start(shape.name)
    for prompt in prompts_of(MIXED_LENGTHS[:12], shape.vocab):
        assert run(core, [prompt]) == [reference(shape.name, prompt, NUM_OUTPUT)], f"length {len(prompt)}"


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix cache", "no prefix cache"])
def test_batch_of_16_with_forced_preemption_matches_transformers(shape, prefix_caching, start, reference):
    core = start(shape.name, num_kv_blocks=TINY_POOL, max_num_batched_tokens=48, enable_prefix_caching=prefix_caching)
    prompts = prompts_of(MIXED_LENGTHS, shape.vocab)
    outputs = run(core, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == reference(shape.name, prompt, NUM_OUTPUT), f"length {len(prompt)}"
    assert num_preemptions(core) > 0


@pytest.mark.parametrize("budget", [16, 17, 19, 24, 31, 32, 33, 64, 100, 2048])
@pytest.mark.parametrize("name", ["qwen3-wide-heads-gqa2", "qwen2-yarn-gqa3"])
def test_any_token_budget_gives_the_same_tokens(name, budget, start, reference):
    prompts = prompts_of(MIXED_LENGTHS, SHAPES[name].vocab)
    expected = [reference(name, prompt, NUM_OUTPUT) for prompt in prompts]
    assert run(start(name, max_num_batched_tokens=budget), prompts) == expected


@pytest.mark.parametrize("num_kv_blocks", [TINY_POOL, 400], ids=["tiny pool", "large pool"])
def test_shared_prefixes_are_reused_and_change_nothing(num_kv_blocks, start, reference):
    name = "qwen3-gqa8-bias"
    (system,) = prompts_of([3 * BLOCK], SHAPES[name].vocab)
    tails = prompts_of([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 20], SHAPES[name].vocab, seed=1)
    prompts = [system + tail for tail in tails]
    expected = [reference(name, prompt, NUM_OUTPUT) for prompt in prompts]
    core = start(name, num_kv_blocks=num_kv_blocks, max_num_batched_tokens=32)
    for _ in range(2):
        assert run(core, prompts) == expected
    stats = core.step().scheduler_stats
    assert stats.prefix_cache_hits > 0


@pytest.mark.parametrize("backend", ["torch_naive", "paged", "flash_attn"])
def test_every_backend_survives_preemption(backend, start, reference):
    name = "qwen3-llama3"
    prompts = prompts_of(MIXED_LENGTHS, SHAPES[name].vocab)
    expected = [reference(name, prompt, NUM_OUTPUT) for prompt in prompts]
    assert run(start(name, num_kv_blocks=TINY_POOL, attention_backend=backend), prompts) == expected


@pytest.mark.parametrize("name", ["qwen3-wide-heads-gqa2", "qwen2-gqa7"])
def test_seeded_sampling_does_not_depend_on_batch_budget_or_preemption(name, start):
    params = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=1234, max_tokens=NUM_OUTPUT)
    prompts = prompts_of(MIXED_LENGTHS, SHAPES[name].vocab)
    calm = start(name)
    alone = [run(calm, [prompt], params)[0] for prompt in prompts]
    cramped = start(name, num_kv_blocks=TINY_POOL, max_num_batched_tokens=20)
    assert run(cramped, prompts, params) == alone
    assert num_preemptions(cramped) > 0
