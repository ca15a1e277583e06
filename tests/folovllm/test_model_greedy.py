"""Greedy tokens of the model runner equal those of transformers, whatever the batch."""

import random

import pytest
import torch
from tests.folovllm.checkpoints import SHAPES
from tests.folovllm.runner_driver import RunnerDriver, make_runner

BLOCK = 4
NUM_OUTPUT = 12
EDGE_LENGTHS = [1, 3, 4, 5, 7, 8, 9, 11, 12, 13]  # 1 to 3 blocks +- 1 token


def prompt_of(length: int, vocab: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length}-{seed}").choices(range(vocab), k=length)


@pytest.fixture(params=sorted(SHAPES))
def shape(request):
    return SHAPES[request.param]


@pytest.mark.parametrize("backend", ["torch_naive", "paged", "flash_attn"])
def test_whole_prompts_alone_match_transformers(shape, backend, checkpoint, reference):
    driver = RunnerDriver(make_runner(checkpoint(shape.name), attention_backend=backend))
    for length in EDGE_LENGTHS:
        prompt = prompt_of(length, shape.vocab)
        assert driver.generate([prompt], NUM_OUTPUT) == [reference(shape.name, prompt, NUM_OUTPUT)], f"length {length}"


def test_mixed_batch_of_16_matches_transformers(shape, checkpoint, reference):
    driver = RunnerDriver(make_runner(checkpoint(shape.name)))
    lengths = [*EDGE_LENGTHS, 17, 33, 64, 100, 30, 2]
    prompts = [prompt_of(length, shape.vocab) for length in lengths]
    # Staggered arrivals, so that prefills and decodes share steps.
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        driver.add(str(i), prompt)
        if i % 3 == 0:
            driver.step_all(chunk=16)
            outputs.update(driver.collect(NUM_OUTPUT))
    outputs.update(driver.run(NUM_OUTPUT, chunk=16))
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)] == reference(shape.name, prompt, NUM_OUTPUT), f"length {len(prompt)}"


@pytest.mark.parametrize("chunk", range(1, 14))
def test_every_chunk_size_matches_transformers(chunk, checkpoint, reference):
    name = "qwen3-wide-heads-gqa2"
    driver = RunnerDriver(make_runner(checkpoint(name)))
    prompts = [prompt_of(length, SHAPES[name].vocab) for length in (13, 12, 11, 1)]
    expected = [reference(name, prompt, NUM_OUTPUT) for prompt in prompts]
    assert driver.generate(prompts, NUM_OUTPUT, chunk=chunk) == expected


@pytest.mark.parametrize("name", ["qwen3-gqa8-bias", "qwen2-linear-gqa4"])
def test_preempted_requests_resume_with_the_same_tokens(name, checkpoint, reference):
    driver = RunnerDriver(make_runner(checkpoint(name)))
    prompts = [prompt_of(length, SHAPES[name].vocab, seed=1) for length in range(5, 21)]
    for i, prompt in enumerate(prompts):
        driver.add(str(i), prompt)
    dice = random.Random(3)
    outputs: dict[str, list[int]] = {}
    while driver.requests:
        for req_id in dice.sample(sorted(driver.requests), k=min(3, len(driver.requests))):
            if driver.requests[req_id].computed and dice.random() < 0.3:
                driver.preempt(req_id)
        # Some requests sit the step out, in an order of their own.
        names = dice.sample(sorted(driver.requests), k=dice.randint(1, len(driver.requests)))
        driver.step({n: min(dice.randint(1, 30), driver.requests[n].remaining) for n in names})
        outputs.update(driver.collect(NUM_OUTPUT))
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)] == reference(name, prompt, NUM_OUTPUT)


def test_prefix_hit_on_another_requests_blocks_gives_the_same_tokens(checkpoint, reference):
    name = "qwen3-llama3"
    driver = RunnerDriver(make_runner(checkpoint(name)))
    prompt = prompt_of(17, SHAPES[name].vocab)
    driver.add("first", prompt)
    driver.step_all()
    driver.add("second", prompt)
    second = driver.requests["second"]
    second.blocks, second.computed = driver.requests["first"].blocks[:4], 16
    outputs = driver.run(NUM_OUTPUT)
    assert outputs["first"] == outputs["second"] == reference(name, prompt, NUM_OUTPUT)


@pytest.mark.parametrize("name", ["qwen3-wide-heads-gqa2", "qwen2-mha-5layers", "qwen3-yarn", "phi3-gqa4-window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_logits_stay_close_to_transformers(name, dtype, checkpoint, hf_model):
    """Tolerance: 4 times the rounding unit of the dtype (2^-8, 2^-11) of the largest logit, for mean and 20 for max."""
    runner = make_runner(checkpoint(name, dtype), dtype="auto")
    assert runner.config.model_config.dtype == dtype
    captured = []
    compute_logits = runner.model.compute_logits
    runner.model.compute_logits = lambda hidden: captured.append(compute_logits(hidden)) or captured[-1]
    prompt = prompt_of(40, SHAPES[name].vocab)
    driver = RunnerDriver(runner)
    driver.add("r", prompt)
    driver.step({"r": 23})
    driver.step({"r": 17})
    with torch.no_grad():
        expected = hf_model(name, dtype)(torch.tensor([prompt])).logits[0, -1].float()
    difference = (captured[0][0].float() - expected).abs()
    unit = torch.finfo(dtype).eps / 2 * expected.abs().max()
    assert difference.mean() <= 4 * unit
    assert difference.max() <= 20 * unit
