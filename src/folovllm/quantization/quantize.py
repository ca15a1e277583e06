"""Quantise a Hugging Face checkpoint: what `kvstrata quantize` does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.quantization.calibration import CalibrationText, read_calibration
from folovllm.quantization.checkpoint import (
    HEAD,
    check_target,
    copy_other_files,
    whole_directory,
    write_config,
    write_weights,
)
from folovllm.quantization.errors import QuantizationError
from folovllm.quantization.gptq import GPTQOptions
from folovllm.quantization.layers import quantize_model
from folovllm.quantization.packing import PackedTensors
from folovllm.quantization.perplexity import perplexity

BITS = (4, 8)
HEAD_BITS = (4, 8, 16)
"""Of the output head; 16 leaves it as it is."""
GROUP_SIZES = (32, 64, 128, -1)

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What became of a checkpoint."""

    out: Path
    bits: int
    head_bits: int
    """Of the output head; 16: left as it was."""
    group_size: int
    sym: bool
    desc_act: bool
    num_layers: int
    """Linear layers quantised, besides the output head."""
    calibration_tokens: int
    held_out_tokens: int
    perplexity_before: float
    """Of the held-out text, with the checkpoint's own weights."""
    perplexity_after: float
    """With the quantised weights, dequantised."""
    quantized_bytes_before: int
    """Of the linear layers."""
    quantized_bytes_after: int
    head_bytes_before: int
    """Of the output head, if it was quantised; 0 if its weights were the embedding's, which stay besides."""
    head_bytes_after: int
    kept_bytes: int
    """Of everything else, which stays as it was: embedding, norms, output head if it was not quantised, biases."""
    seconds: float

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one per cent."""
        return self.perplexity_after / self.perplexity_before - 1


def quantize_checkpoint(
    model: Path,
    out: Path,
    *,
    bits: int = 4,
    head_bits: int = 16,
    group_size: int = 128,
    calibration: Path,
    sym: bool = True,
    desc_act: bool = False,
    num_windows: int = 128,
    window_tokens: int = 512,
    progress: Progress = lambda *_: None,
) -> QuantizeReport:
    """Write a GPTQ checkpoint that folovllm, vLLM and GPTQModel load, and AutoGPTQ unless the head is quantised.

    A quantised output head is written as GPTQModel has it: "lm_head" is true, a "dynamic" rule says its bits if they
    differ, and it is tied to the embedding no longer, which keeps its weights.

    Args:
        model: directory of an unquantised checkpoint of a Llama-like decoder.
        out: where to write; must not exist, or be an empty directory.
        bits: 4 or 8.
        head_bits: 4 or 8, by GPTQ with the hidden states after the last layer; 16 leaves the head as it is.
        group_size: inputs that share a scale: 32, 64, 128, or -1 for all.
        calibration: UTF-8 text; its last tenth is kept to measure the perplexity with.
        sym: zero points in the middle; else each group has its own, and the format is "gptq_v2".
        desc_act: round the inputs with the largest activations first.
        num_windows: pieces of the text to quantise by, and a quarter as many to measure with; fewer if it is short.
        window_tokens: their length.
        progress: called as the work goes on.

    Raises:
        QuantizationError: an option, the checkpoint, the text or the target is not fit; nothing is left behind.
    """
    begin = time.monotonic()
    _check_options(bits, head_bits, group_size, num_windows, window_tokens)
    check_target(out)
    source_files = _source_files(model)
    network, tokenizer = _load(model)
    text = read_calibration(calibration, tokenizer, num_windows, window_tokens, max(1, num_windows // 4))
    options = GPTQOptions(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    before, after, packed = _quantize(network, text, options, None if head_bits == 16 else head_bits, progress)
    with whole_directory(out) as directory:
        progress("writing", 0, 1)
        sizes = write_weights(source_files, packed, directory)
        copy_other_files(model, directory)
        write_config(model, directory, _quantization_config(options, head_bits))
    progress("writing", 1, 1)
    return QuantizeReport(
        out=out,
        bits=bits,
        head_bits=head_bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        num_layers=len(packed) - (HEAD in packed),
        calibration_tokens=text.windows.numel(),
        held_out_tokens=text.held_out.numel(),
        perplexity_before=before,
        perplexity_after=after,
        quantized_bytes_before=sizes["quantized_before"],
        quantized_bytes_after=sizes["quantized_after"],
        head_bytes_before=sizes["head_before"],
        head_bytes_after=sizes["head_after"],
        kept_bytes=sizes["kept"],
        seconds=time.monotonic() - begin,
    )


def _quantize(
    network: Any, text: CalibrationText, options: GPTQOptions, head_bits: int | None, progress: Progress
) -> tuple[float, float, dict[str, PackedTensors]]:
    progress("perplexity before", 0, 1)
    before = perplexity(network, text.held_out)
    progress("perplexity before", 1, 1)
    packed: dict[str, PackedTensors] = {}
    quantize_model(
        network,
        text.windows,
        options,
        zero_offset=_zero_offset(options),
        on_packed=packed.__setitem__,
        on_layer=lambda done, total: progress("layers", done, total),
        head_bits=head_bits,
    )
    progress("perplexity after", 0, 1)
    after = perplexity(network, text.held_out)
    progress("perplexity after", 1, 1)
    return before, after, packed


def _zero_offset(options: GPTQOptions) -> int:
    # A zero point of 0 less one does not fit; readers of the older format disagree on what it then means.
    return 1 if options.sym else 0


def _quantization_config(options: GPTQOptions, head_bits: int) -> dict[str, Any]:
    differs = head_bits not in (16, options.bits)
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": options.desc_act,
        "sym": options.sym,
        "checkpoint_format": "gptq" if _zero_offset(options) else "gptq_v2",
        "damp_percent": options.damp_percent,
        "true_sequential": True,
        "static_groups": False,
        "lm_head": head_bits != 16,
        **({"dynamic": {HEAD: {"bits": head_bits}}} if differs else {}),
        "pack_dtype": "int32",
        "meta": {"quantizer": ["kvstrata"]},
    }


def _check_options(bits: int, head_bits: int, group_size: int, num_windows: int, window_tokens: int) -> None:
    choices = ("bits", bits, BITS), ("head_bits", head_bits, HEAD_BITS), ("group_size", group_size, GROUP_SIZES)
    for name, value, allowed in choices:
        if value not in allowed:
            raise QuantizationError(f"{name}={value} is not allowed; it must be one of {', '.join(map(str, allowed))}")
    for name, value, least in (("num_windows", num_windows, 1), ("window_tokens", window_tokens, 2)):
        if value < least:
            raise QuantizationError(f"{name}={value} is not allowed; it must be at least {least}")


def _source_files(model: Path) -> list[Path]:
    from folovllm.errors import ModelLoadError
    from folovllm.model_executor.loader import checkpoint_files

    try:
        return checkpoint_files(model)
    except ModelLoadError as error:
        raise QuantizationError(str(error)) from error


def _load(model: Path) -> tuple[Any, Any]:
    """The checkpoint in transformers, in its own dtype, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
        if getattr(config, "quantization_config", None) is not None:
            raise QuantizationError(f"{model} is quantised already")
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise QuantizationError(f"{model} cannot be loaded: {error}") from error
    network.train(False)
    return network, tokenizer
