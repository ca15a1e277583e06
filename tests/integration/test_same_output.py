"""What a cache must never change: the tokens. One batch of prompts, every cache configuration, one output."""

import random
from pathlib import Path

import pytest

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams

STORE = {"kv_connector": "FlexKVConnectorV1", "kv_connector_extra_config": {"cpu_cache_gb": 0.02}}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
BASE = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 256, "max_model_len": 1024, "num_threads": 1}


def prompts() -> list[list[int]]:
    """Token ids around block borders, with shared prefixes, an exact repetition and a short one."""
    rng = random.Random(3)
    shared = [rng.randrange(300, 2000) for _ in range(48)]
    tails = [[rng.randrange(300, 2000) for _ in range(n)] for n in (0, 1, 15, 16, 17, 33)]
    return [*(shared + tail for tail in tails), shared[:16], shared[:5], shared]


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[list[int]]:
    with LLM(str(small_model), **BASE, enable_prefix_caching=False, max_num_seqs=1) as llm:
        return tokens(llm)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY)]


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": True},
        {"enable_prefix_caching": False},
        {"kv_transfer_config": STORE},
        {"kv_transfer_config": STORE, "enable_prefix_caching": False},
        {"num_kv_blocks": 12},
        {"num_kv_blocks": 12, "kv_transfer_config": STORE},
        *({"max_num_batched_tokens": budget} for budget in (16, 17, 31, 64, 1000)),
        {"max_num_batched_tokens": 16, "kv_transfer_config": STORE},
        {"enable_chunked_prefill": False},
        {"block_size": 32},
        {"attention_backend": "torch_naive"},
    ],
    ids=str,
)
def test_no_cache_changes_the_tokens(small_model, expected, options):
    with LLM(str(small_model), **{**BASE, **options}) as llm:
        assert tokens(llm) == expected
        assert tokens(llm) == expected, "with warm caches"
        assert llm.reset_prefix_cache()
        assert tokens(llm) == expected, "after a reset of the device's cache"


def test_a_reset_cache_is_restored_from_the_store(small_model):
    with LLM(str(small_model), **BASE, kv_transfer_config=STORE) as llm:
        prompt = prompts()[5]
        cold = llm.generate([prompt], GREEDY)[0]
        assert cold.num_cached_tokens == 0
        assert llm.reset_prefix_cache()
        restored = llm.generate([prompt], GREEDY)[0]
        assert restored.num_cached_tokens == restored.num_external_cached_tokens == (len(prompt) - 1) // 16 * 16
        assert restored.outputs[0].token_ids == cold.outputs[0].token_ids


def test_tenants_with_different_salts_share_nothing(small_model):
    with LLM(str(small_model), **BASE, kv_transfer_config=STORE) as llm:
        prompt = prompts()[5]
        llm.generate([prompt], GREEDY, cache_salt="a")
        assert llm.generate([prompt], GREEDY, cache_salt="b")[0].num_cached_tokens == 0
        assert llm.reset_prefix_cache()
        assert llm.generate([prompt], GREEDY, cache_salt="c")[0].num_cached_tokens == 0
        assert llm.generate([prompt], GREEDY, cache_salt="a")[0].num_external_cached_tokens > 0
