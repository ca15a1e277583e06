"""The engine and the store on a CUDA device: the same tokens as on the CPU and in transformers, by every path."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.folovllm.runner_driver import RunnerDriver
from transformers import AutoModelForCausalLM, PreTrainedModel

from folovllm.attention.backends.triton_unified import TritonUnifiedBackend
from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.llm import LLM
from folovllm.executor.worker_factory import create_worker
from folovllm.model_executor.parallel import SINGLE
from folovllm.sampling_params import SamplingParams
from folovllm.worker.cuda_graphs import GraphedForward
from folovllm.worker.model_runner import ModelRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_OUTPUT = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 256, "max_model_len": 1024}
STORE = {"kv_connector": "FlexKVConnectorV1", "kv_connector_extra_config": {"cpu_cache_gb": 0.02}}
PROMPTS = [[300 + (7 * i * n) % 1500 for i in range(n)] for n in (5, 16, 17, 100, 333)]


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """No TF32, in which fp32 products have 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def expected(small_model) -> list[list[int]]:
    with LLM(str(small_model), device="cpu", **OPTIONS) as llm:
        return tokens(llm)


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def cuda_llm(model: Any, **options: Any) -> LLM:
    return LLM(str(model), device="cuda", **{**OPTIONS, **options})


@pytest.mark.parametrize("backend", ["auto", "torch_naive", "flash_attn"])
def test_cuda_gives_the_tokens_of_the_cpu(small_model, expected, backend):
    with cuda_llm(small_model, attention_backend=backend) as llm:
        assert tokens(llm) == expected


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked_prefill_gives_the_same_tokens(small_model, expected, chunk):
    with cuda_llm(small_model, max_num_batched_tokens=chunk) as llm:
        assert tokens(llm) == expected


def test_async_scheduling_gives_the_same_tokens(small_model, expected):
    with cuda_llm(small_model, async_scheduling=True) as llm:
        assert tokens(llm) == expected


def test_cuda_loads_from_the_cpu_tier(small_model, expected):
    with cuda_llm(small_model, kv_transfer_config=STORE) as llm:
        assert tokens(llm) == expected
        assert llm.reset_prefix_cache()
        restored = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in restored] == expected
    assert restored[-1].num_external_cached_tokens == 320


def test_prefix_cache_changes_no_token(small_model, expected):
    with cuda_llm(small_model, enable_prefix_caching=False) as llm:
        assert tokens(llm) == expected
    with cuda_llm(small_model) as llm:
        assert tokens(llm) == expected
        again = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in again] == expected
    assert again[-1].num_cached_tokens == 320


@pytest.mark.parametrize("batch", [1, 3, 9, 20])
def test_cuda_graphs_change_no_token(small_model, batch):
    prompts = [[(11 * i * n) % 2000 for i in range(1, n + 3)] for n in range(batch)]
    results = []
    for enforce_eager in (True, False):
        with cuda_llm(small_model, enforce_eager=enforce_eager, max_num_seqs=16) as llm:
            results.append(tokens(llm, prompts))
    assert results[0] == results[1]


def test_seeded_request_gives_the_same_tokens_alone_and_in_a_batch(small_model):
    with cuda_llm(small_model) as llm:
        for params in (
            SamplingParams(temperature=1.0, seed=3, max_tokens=12),
            SamplingParams(temperature=0.9, top_k=40, seed=4, max_tokens=12),
            SamplingParams(temperature=1.5, top_p=0.99, seed=5, max_tokens=12),
        ):
            alone = [tokens(llm, [prompt], params)[0] for prompt in PROMPTS]
            assert tokens(llm, PROMPTS, params) == alone


# -- against transformers ---------------------------------------------------------------------------------------------
# How much less likely a token may be than the best one there. In bf16 a logit of 4 to 8 is a multiple of 1/32.
SLACK = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}


@pytest.mark.parametrize("dtype", SLACK)
def test_greedy_tokens_are_best_or_nearly_so_in_transformers(small_model, dtype):
    with cuda_llm(small_model, dtype=dtype) as llm:
        outputs = tokens(llm)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        small_model, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).to("cuda")
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(output, device="cuda")[:, None])[:, 0]
        assert float((logits.amax(dim=-1) - chosen).max()) <= SLACK[dtype]


# -- no waiting -------------------------------------------------------------------------------------------------------
def cuda_runner(model: Any, **options: Any) -> ModelRunner:
    args = EngineArgs(model=str(model), device="cuda", **{**OPTIONS, **options})
    return create_worker(args.resolve(), SINGLE).model_runner


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.skipif(TritonUnifiedBackend.missing_package() is not None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1.0, seed=1, max_tokens=64),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=1, max_tokens=64),
        SamplingParams(temperature=1.8, top_p=0.999, min_p=0.001, seed=1, max_tokens=64),
        SamplingParams(temperature=0.7, repetition_penalty=1.1, presence_penalty=0.2, seed=1, max_tokens=64),
        SamplingParams(temperature=0.0, logit_bias={5: 2.0}, max_tokens=64),
    ],
    ids=["greedy", "free", "top-k", "wide top-p", "penalties", "bias"],
)
def test_a_step_waits_for_the_device_once(small_model, params, enforce_eager):
    driver = RunnerDriver(cuda_runner(small_model, enforce_eager=enforce_eager))
    for i, prompt in enumerate(PROMPTS):
        driver.add(f"r{i}", prompt, params)
    driver.step_all()  # kernels are compiled
    driver.step_all()
    # The wait for the tokens' event is none of torch's copies, which this mode refuses when they wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            driver.step_all()
        driver.add("late", PROMPTS[3], params)
        driver.step_all(chunk=40)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_decodes_are_replayed_unless_eager_is_asked_for(small_model):
    assert isinstance(cuda_runner(small_model).compute, GraphedForward)
    assert not isinstance(cuda_runner(small_model, enforce_eager=True).compute, GraphedForward)
