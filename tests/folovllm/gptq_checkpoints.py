"""Pairs of checkpoints: one quantised as its options say, one with the same weights dequantised."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from folovllm.quantization.checkpoint import HEAD, write_weights
from folovllm.quantization.gptq import GPTQOptions, quantize_layer

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def write_pair(
    source: Path, directory: Path, options: dict[str, Any], settings: Callable[[str], GPTQOptions | None]
) -> tuple[Path, Path]:
    """Quantise each module by its settings, if it has any, for inputs of random scales.

    Args:
        source: an unquantised checkpoint in one file.
        directory: where to write.
        options: the quantised checkpoint's quantization_config, besides the method.
        settings: of a module, by its name.

    Returns:
        The dequantised and the quantised checkpoint. A quantised head of the former is not tied to the embedding; in
        the latter's config.json it is if it was.
    """
    reference, quantized = directory / "reference", directory / "quantized"
    state, packed = load_file(source / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    config = json.loads((source / "config.json").read_text())
    names = [name.removesuffix(".weight") for name in state if name.endswith("_proj.weight")]
    for name in [*names, HEAD]:
        chosen = settings(name)
        if chosen is None:
            continue
        weight = state.get(f"{name}.weight", state["model.embed_tokens.weight"])
        diagonal = torch.rand(weight.shape[1], generator=generator) + 0.1
        layer = quantize_layer(weight, diagonal.diag(), chosen, torch.float16)
        packed[name] = layer.packed(chosen.bits, ZERO_OFFSETS[options.get("checkpoint_format", "gptq")], torch.float16)
        state[f"{name}.weight"] = layer.dequantized()
    reference.mkdir()
    quantized.mkdir()
    save_file(state, reference / "model.safetensors", metadata={"format": "pt"})
    write_weights([source / "model.safetensors"], packed, quantized)
    untied = {"tie_word_embeddings": False} if HEAD in packed else {}
    (reference / "config.json").write_text(json.dumps(config | untied))
    quantization = {"quant_method": "gptq"} | options
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, quantized)
    return reference, quantized
