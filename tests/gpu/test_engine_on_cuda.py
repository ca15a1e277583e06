"""The engine and the store on a CUDA device: the same tokens as on the CPU, also after a load from the CPU tier."""

import pytest
import torch

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
OPTIONS = {"dtype": "float32", "num_kv_blocks": 128, "max_model_len": 1024}
STORE = {"kv_connector": "FlexKVConnectorV1", "kv_connector_extra_config": {"cpu_cache_gb": 0.02}}
PROMPTS = [[300 + (7 * i * n) % 1500 for i in range(n)] for n in (5, 16, 17, 100, 333)]


@pytest.fixture(scope="module")
def expected(small_model) -> list[list[int]]:
    with LLM(str(small_model), device="cpu", **OPTIONS) as llm:
        return tokens(llm)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("backend", ["torch_naive", "flash_attn"])
def test_cuda_gives_the_tokens_of_the_cpu(small_model, expected, backend):
    with LLM(str(small_model), device="cuda", attention_backend=backend, **OPTIONS) as llm:
        assert tokens(llm) == expected


def test_cuda_loads_from_the_cpu_tier(small_model, expected):
    with LLM(str(small_model), device="cuda", kv_transfer_config=STORE, **OPTIONS) as llm:
        assert tokens(llm) == expected
        assert llm.reset_prefix_cache()
        restored = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in restored] == expected
    assert restored[-1].num_external_cached_tokens == 320
