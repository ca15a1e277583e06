"""Write a quantised checkpoint that is there whole or not at all.

Everything goes to a hidden directory beside the target, which gets the target's name when the last byte is written.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from folovllm.quantization.errors import QuantizationError
from folovllm.quantization.packing import PackedTensors

HEAD = "lm_head"
"""Name of the output head."""
MAX_FILE_BYTES = 4 << 30
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")
_NOT_COPIED = ("config.json", "quantize_config.json", "model.safetensors.index.json")


def check_target(out: Path) -> None:
    """Return when a checkpoint can be written there.

    Raises:
        QuantizationError: it is a file, or a directory with something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizationError(f"{out} exists and is not an empty directory; give another")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `out` if the block ends well and disappears if it does not.

    Raises:
        QuantizationError: `out` cannot be made.
    """
    check_target(out)
    out = out.absolute()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise QuantizationError(f"cannot write to {out}: {error}") from error
    try:
        yield partial
        partial.replace(out)
    except OSError as error:
        raise QuantizationError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(source_files: list[Path], packed: Mapping[str, PackedTensors], directory: Path) -> dict[str, int]:
    """Copy the source's tensors, the weights of the quantised layers replaced by their packed tensors.

    Args:
        source_files: safetensors files of the unquantised checkpoint.
        packed: by the layer's name, without ".weight"; one that the source lacks, a head whose weights are the
            embedding's, is added.
        directory: where to write model.safetensors, or shards and their index.

    Returns:
        Bytes by kind: "quantized_before" and "quantized_after" of the layers, "head_before" and "head_after" of a
        quantised output head, "kept".
    """
    sizes = dict.fromkeys(("quantized_before", "quantized_after", "head_before", "head_after", "kept"), 0)
    shards, left = _ShardWriter(directory), dict(packed)
    for file in source_files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                tensor = opened.get_tensor(name)
                layer_name = name.removesuffix(".weight")
                if name == layer_name or layer_name not in left:
                    shards.add(name, tensor)
                    sizes["kept"] += tensor.nbytes
                    continue
                sizes[f"{_kind(layer_name)}_before"] += tensor.nbytes
                sizes[f"{_kind(layer_name)}_after"] += shards.add_packed(layer_name, left.pop(layer_name))
    for layer_name, layer in left.items():
        sizes[f"{_kind(layer_name)}_after"] += shards.add_packed(layer_name, layer)
    shards.close()
    return sizes


def _kind(layer_name: str) -> str:
    return "head" if layer_name == HEAD else "quantized"


def copy_other_files(source: Path, directory: Path) -> None:
    """Tokenizer, generation options, chat template, licence."""
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in _NOT_COPIED:
                shutil.copy(file, directory / file.name)


def write_config(source: Path, directory: Path, quantization_config: Mapping[str, Any]) -> None:
    """config.json with the quantisation in it, and quantize_config.json, which older loaders read."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = dict(quantization_config)
    if quantization_config.get("lm_head"):
        # The head has weights of its own now, which readers that still tie it to the embedding would not look for.
        config["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "quantize_config.json").write_text(json.dumps(dict(quantization_config), indent=2) + "\n")


class _ShardWriter:
    """Collects tensors and writes a file whenever enough have come."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors: dict[str, torch.Tensor] = {}
        self._num_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._tensors and self._num_bytes + tensor.nbytes > MAX_FILE_BYTES:
            self._write()
        self._tensors[name] = tensor.contiguous()
        self._num_bytes += tensor.nbytes

    def add_packed(self, layer_name: str, layer: PackedTensors) -> int:
        """Returns: its bytes."""
        for suffix, part in layer.named().items():
            self.add(f"{layer_name}.{suffix}", part)
        return sum(part.nbytes for part in layer.named().values())

    def close(self) -> None:
        self._write()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05}-of-{count:05}.safetensors"
            self._path(i).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _path(self, shard: int) -> Path:
        return self._directory / f"shard-{shard}"

    def _write(self) -> None:
        save_file(self._tensors, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._tensors))
        self._total_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0
