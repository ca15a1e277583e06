"""A quantised checkpoint in the engine generates what its dequantised weights generate."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.folovllm.checkpoints import SHAPES
from tests.folovllm.runner_driver import RunnerDriver, make_runner

from folovllm.model_executor.layers.quantization import GPTQConfig
from folovllm.quantization.checkpoint import write_weights
from folovllm.quantization.gptq import GPTQOptions, quantize_layer
from folovllm.quantization.packing import PackedTensors


def quantize_weights(source: Path, options: GPTQOptions, zero_offset: int) -> tuple[dict[str, PackedTensors], dict]:
    """Every projection, for inputs of random scales; and the whole state with them dequantised."""
    generator = torch.Generator().manual_seed(0)
    packed, state = {}, load_file(source / "model.safetensors")
    for name, weight in state.items():
        if not name.endswith("_proj.weight"):
            continue
        # Parts of a merged layer see the same inputs, but here not always: orders of their own must work too.
        diagonal = torch.rand(weight.shape[1], generator=generator) + 0.1
        layer = quantize_layer(weight, diagonal.diag(), options, torch.float16)
        packed[name.removesuffix(".weight")] = layer.packed(options.bits, zero_offset, torch.float16)
        state[name] = layer.dequantized()
    return packed, state


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", ["qwen3-gqa8-bias", "qwen2-gqa7", "phi3-gqa4-window"])
@pytest.mark.parametrize(
    "config",
    [GPTQConfig(4, 32, False, True), GPTQConfig(4, 32, True, False, "gptq_v2"), GPTQConfig(8, -1, False, False)],
    ids=["int4", "int4-desc_act", "int8"],
)
def test_greedy_tokens_are_those_of_the_dequantised_weights(name, config, kernels, checkpoint, tmp_path):
    source = checkpoint(name)
    options = replace(
        GPTQOptions(), bits=config.bits, group_size=config.group_size, sym=config.sym, desc_act=config.desc_act
    )
    packed, state = quantize_weights(source, options, config.zero_offset)
    reference, quantized = tmp_path / "reference", tmp_path / "quantized"
    for directory in (reference, quantized):
        directory.mkdir()
        shutil.copy(source / "config.json", directory)
    save_file(state, reference / "model.safetensors", metadata={"format": "pt"})
    write_weights([source / "model.safetensors"], packed, quantized)
    hf_config = json.loads((source / "config.json").read_text())
    hf_config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "checkpoint_format": config.checkpoint_format,
    }
    (quantized / "config.json").write_text(json.dumps(hf_config))

    vocab = SHAPES[name].vocab
    prompts = [random.Random(length).choices(range(vocab), k=length) for length in (1, 7, 30)]
    expected = RunnerDriver(make_runner(reference, kernels=kernels)).generate(prompts, 12)
    assert RunnerDriver(make_runner(quantized, kernels=kernels)).generate(prompts, 12) == expected
