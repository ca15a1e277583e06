"""A quantised output head gives the tokens of its dequantised weights, in every way that a head is used."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.folovllm.checkpoints import Q3, Shape, make_checkpoint
from tests.folovllm.gptq_checkpoints import write_pair
from tests.folovllm.runner_driver import RunnerDriver, make_runner

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.llm import LLM
from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.linear_weights import PackedWeights
from folovllm.model_executor.layers.quantization import GPTQLinearWeights
from folovllm.model_executor.recorded_forward import RecordedForward
from folovllm.quantization.gptq import GPTQOptions
from folovllm.sampling_params import SamplingParams

VOCAB = 264
LAYERS = GPTQOptions(bits=4, group_size=32)
BASE = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": True}
PROMPTS = [random.Random(length).choices(range(VOCAB), k=length) for length in (1, 7, 30)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(tied, dtype) -> an unquantised checkpoint."""
    made = {}

    def get(tied, dtype=torch.float32):
        if (tied, dtype) not in made:
            shape = Shape("gptq-head", Q3, 64, 4, 2, 2, VOCAB, tied=tied, head_dim=16)
            made[tied, dtype] = make_checkpoint(tmp_path_factory.mktemp("source") / "model", shape, dtype)
        return made[tied, dtype]

    return get


def write(source, directory, head: GPTQOptions, **changes):
    """The pair with 4-bit layers and this head."""
    differing = {name: getattr(head, name) for name in ("bits", "group_size", "desc_act", "sym")}
    options = BASE | {"dynamic": {"lm_head": differing}} | changes
    return write_pair(source, directory, options, lambda module: head if module == "lm_head" else LAYERS)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("head", "changes"),
    [
        (LAYERS, {"dynamic": None}),
        (replace(LAYERS, bits=8), {}),
        (GPTQOptions(bits=8, group_size=-1, sym=False), {"checkpoint_format": "gptq_v2"}),
        (GPTQOptions(bits=4, group_size=64, sym=False, desc_act=True), {"checkpoint_format": "gptq_v2"}),
    ],
    ids=["int4", "int8", "int8-one-group", "int4-desc_act"],
)
def test_greedy_tokens_are_those_of_the_dequantised_head(head, changes, tied, kernels, source, tmp_path):
    reference, quantized = write(source(tied), tmp_path, head, **changes)
    expected = RunnerDriver(make_runner(reference, kernels=kernels)).generate(PROMPTS, 12)
    assert RunnerDriver(make_runner(quantized, kernels=kernels)).generate(PROMPTS, 12) == expected


@pytest.mark.parametrize("changes", [{"lm_head": False}, {"dynamic": {"-:lm_head": {}}}], ids=["unset", "excluded"])
def test_a_head_that_is_not_quantised_stays_the_embedding(changes, source, tmp_path):
    settings = lambda module: None if module == "lm_head" else LAYERS  # noqa: E731
    reference, quantized = write_pair(source(True), tmp_path, BASE | changes, settings)
    runner = make_runner(quantized)
    assert isinstance(runner.model.lm_head.weights, PackedWeights)
    expected = RunnerDriver(make_runner(reference)).generate(PROMPTS, 12)
    assert RunnerDriver(runner).generate(PROMPTS, 12) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_fp32_and_a_row_has_the_same_bits_in_any_batch(bits, source, tmp_path):
    reference, quantized = write(source(True), tmp_path, replace(LAYERS, bits=bits))
    options = {"dtype": "bfloat16", "attention_backend": "paged", "batch_invariant": True}
    model = make_runner(quantized, **options).model
    assert isinstance(model.lm_head.weights, GPTQLinearWeights)
    hidden = torch.randn(250, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    together = model.compute_logits(hidden).clone()
    assert together.dtype is torch.float32
    weight = make_runner(reference, kernels="torch").model.lm_head.weights.row_major()
    expected = hidden.float() @ weight.t()
    assert (together - expected).abs().max() < 0.01 * expected.abs().max()
    for start, stop in ((0, 1), (249, 250), (100, 107), (30, 90)):
        assert torch.equal(model.compute_logits(hidden[start:stop]), together[start:stop])


def test_decode_steps_run_the_recording(source, tmp_path):
    _, quantized = write(source(True), tmp_path, replace(LAYERS, bits=8))
    runner = make_runner(quantized, dtype="bfloat16", attention_backend="paged")
    calls = []

    def counted(*args):
        calls.append(args)
        return runner.model(*args)

    runner.compute = RecordedForward(counted, [runner.model.ops.workspace, runner.backend.workspace])
    recorded = RunnerDriver(runner).generate(PROMPTS, 12)
    assert len(calls) == 2  # the first makes the buffers, the second is recorded
    runner.compute = runner.model
    assert RunnerDriver(runner).generate(PROMPTS, 12) == recorded


def test_the_embedding_is_looked_up_in_the_checkpoint_itself(source, tmp_path):
    _, quantized = write(source(True, torch.bfloat16), tmp_path, replace(LAYERS, bits=8))
    embedding = make_runner(quantized, dtype="float32").model.embed_tokens
    assert embedding._table is not None
    assert embedding._table.dtype is torch.bfloat16  # the file's own, neither packed nor converted
    ids = torch.tensor([0, 5, VOCAB - 1, 5], dtype=torch.int32)
    assert torch.equal(embedding(ids), embedding._table[ids.long()].float())


def test_no_page_of_the_checkpoint_stays_in_memory(source, tmp_path):
    _, quantized = write(source(True), tmp_path, replace(LAYERS, bits=8))
    runner = make_runner(quantized)
    assert resident_kib(quantized / "model.safetensors") == 0
    RunnerDriver(runner).generate(PROMPTS, 2)
    assert resident_kib(quantized / "model.safetensors") > 0  # of the embedding, which is looked up there


def resident_kib(file: Path) -> int:
    """Of this process's maps of the file."""
    sizes, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split(" ", 1)[0].count("-") == 1 and ":" not in line.split(" ", 1)[0]:
            is_of_file = line.endswith(str(file))
        elif is_of_file and line.startswith("Rss:"):
            sizes += int(line.split()[1])
    return sizes


def test_two_ranks_share_the_head(source, tmp_path):
    head = replace(LAYERS, bits=8)
    options = BASE | {"bits": 8, "dynamic": {"-:model": {}}}
    _, quantized = write_pair(source(True), tmp_path, options, lambda module: head if module == "lm_head" else None)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    def generate(size: int) -> list[list[int]]:
        options = {"num_kv_blocks": 64, "num_threads": 1, "dtype": "float32", "tensor_parallel_size": size}
        with LLM(str(quantized), skip_tokenizer_init=True, **options) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy)]

    assert generate(2) == generate(1)


def test_a_vocabulary_that_does_not_fill_words_is_refused(checkpoint, tmp_path):
    settings = lambda module: None if module == "lm_head" else LAYERS  # noqa: E731
    _, quantized = write_pair(checkpoint("qwen3-1layer-mha"), tmp_path, BASE, settings)
    with pytest.raises(ModelLoadError, match="lm_head: a layer with 101 outputs cannot be packed in 4 bits"):
        make_runner(quantized)


def test_a_checkpoint_without_the_tensors_of_its_quantised_head_is_refused(source, tmp_path):
    settings = lambda module: None if module == "lm_head" else LAYERS  # noqa: E731
    _, quantized = write_pair(source(True), tmp_path, BASE, settings)
    with pytest.raises(ModelLoadError, match=r"missing: lm_head\.qweight"):
        make_runner(quantized)


def test_batch_invariance_is_promised_for_a_quantised_head(source, tmp_path):
    _, quantized = write(source(True), tmp_path, replace(LAYERS, bits=8))
    assert EngineArgs(model=str(quantized), batch_invariant=True).resolve().batch_invariant
