"""From a Hugging Face checkpoint directory to a model whose every parameter is filled.

Weights are read from memory-mapped safetensors, single (`model.safetensors`) or sharded
(`model.safetensors.index.json`), and copied once into the parameters, converted to the engine's dtype.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.config import EngineConfig
from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.linear import MergedLinear
from folovllm.model_executor.models.dense import DenseForCausalLM
from folovllm.model_executor.models.registry import resolve_model_class

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAMES_SHOWN = 8


def load_model(config: EngineConfig, backend: AttentionBackend) -> DenseForCausalLM:
    """Build the checkpoint's model on the configured device and fill it.

    Raises:
        ModelLoadError: unsupported architecture, or a checkpoint that is incomplete, corrupt or of other shapes.
    """
    model_config = config.model_config
    model_class = resolve_model_class(model_config.hf_config)
    files = checkpoint_files(Path(model_config.model))
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(model_config.dtype)
    try:
        with config.device:
            model = model_class(model_config.hf_config, backend, model_config.max_model_len)
    finally:
        torch.set_default_dtype(default_dtype)
    load_weights(model.to(config.device), files)
    logger.info("model loaded architecture=%s files=%d", model_class.__name__, len(files))
    return model.eval()


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ModelLoadError: there are none, the index is unreadable, or a shard it names is missing.
    """
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise ModelLoadError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; weights must be in safetensors format"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{index} is not a safetensors index: {error!r}") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelLoadError(f"{index} names files that are missing: {_shown(missing)}")
    return [directory / name for name in names]


def load_weights(model: DenseForCausalLM, files: list[Path]) -> None:
    """Copy every tensor of `files` to its place.

    Raises:
        ModelLoadError: a parameter stays unfilled, a tensor has no place, is there twice, or has another shape.
    """
    destinations = dict(_destinations(model))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    filled: set[str] = set()
    unexpected: list[str] = []
    for file in files:
        for name, tensor in _tensors(file):
            if _is_redundant(name, tied):
                continue
            destination = destinations.get(name)
            if destination is None:
                unexpected.append(name)
                continue
            if name in filled:
                raise ModelLoadError(f"{file} repeats tensor {name}, which another file holds too")
            _copy(destination, tensor, name, file)
            filled.add(name)
    missing = [name for name in destinations if name not in filled]
    if missing or unexpected:
        faults = [f"missing: {_shown(missing)}"] if missing else []
        faults += [f"not part of the model: {_shown(unexpected)}"] if unexpected else []
        raise ModelLoadError(f"the weights in {files[0].parent} do not fit config.json; {'; '.join(faults)}")


def _destinations(model: DenseForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint name -> rows to fill, for every parameter; a merged layer yields one per part."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for suffix, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            if not isinstance(module, MergedLinear):
                yield f"{prefix}.{suffix}", parameter.data
                continue
            parent, start = prefix.rpartition(".")[0], 0
            for part, size in module.parts.items():
                yield f"{parent}.{part}.{suffix}", parameter.data[start : start + size]
                start += size


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and memory-mapped tensor of everything in `file`; the map is released afterwards."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is not a readable safetensors file: {error}") from error


def _is_redundant(name: str, tied: bool) -> bool:
    # Some checkpoints repeat the tied head; old ones store the rotary frequencies, which follow from config.json.
    return (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def _copy(destination: torch.Tensor, tensor: torch.Tensor, name: str, file: Path) -> None:
    if tensor.shape != destination.shape:
        raise ModelLoadError(
            f"tensor {name} in {file} has shape {list(tensor.shape)}, config.json implies {list(destination.shape)}"
        )
    if not tensor.is_floating_point():
        raise ModelLoadError(f"tensor {name} in {file} is {tensor.dtype}; only floating point weights are supported")
    destination.copy_(tensor)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
