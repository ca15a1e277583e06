"""From a Hugging Face checkpoint directory to a model whose every weight is in place.

Weights are memory-mapped from safetensors, single (`model.safetensors`) or sharded (`model.safetensors.index.json`).
Each layer takes its tensors straight from the map into the form it computes with, and the pages go back at once: there
is never a second copy.
"""

import json
import logging
import time
from pathlib import Path

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.config import EngineConfig
from folovllm.errors import ModelLoadError
from folovllm.model_executor.build import BuildContext, WeightRegistry
from folovllm.model_executor.layers.quantization import read_gptq_config
from folovllm.model_executor.models.dense import DenseForCausalLM
from folovllm.model_executor.models.registry import resolve_model_class
from folovllm.model_executor.parallel import TensorParallel
from folovllm.model_executor.safetensors_map import SafetensorsMap
from folovllm.ops.abstract import Ops
from folovllm.ops.cpu_ops import CPUOps
from folovllm.ops.torch_ops import TorchOps
from folovllm.ops.workspace import Workspace
from folovllm.triton_support import has_triton

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAMES_SHOWN = 8


def load_model(config: EngineConfig, backend: AttentionBackend, parallel: TensorParallel) -> DenseForCausalLM:
    """Build this rank's share of the checkpoint's model on the configured device and fill it.

    Raises:
        ModelLoadError: unsupported architecture, or a checkpoint that is incomplete, corrupt or of other shapes.
        ConfigError: the model cannot be shared out over the ranks.
    """
    started = time.monotonic()
    model_config = config.model_config
    model_class = resolve_model_class(model_config.hf_config)
    directory = Path(model_config.model)
    files = checkpoint_files(directory)
    has_native_kernels = config.device.type == "cpu" and config.kernels == "auto"
    workspace = Workspace(config.device) if has_native_kernels else None
    ops = _make_ops(config, workspace)
    context = BuildContext(
        hf_config=model_config.hf_config,
        dtype=model_config.dtype,
        device=config.device,
        max_positions=model_config.max_model_len,
        backend=backend,
        ops=ops,
        workspace=workspace,
        parallel=parallel,
        quantization=read_gptq_config(directory, getattr(model_config.hf_config, "quantization_config", None)),
        batch_invariant=config.batch_invariant,
    )
    model = model_class(context)
    load_weights(context.weights, files)
    took = time.monotonic() - started
    logger.info("model loaded architecture=%s files=%d seconds=%.2f", model_class.__name__, len(files), took)
    return model


def _make_ops(config: EngineConfig, workspace: Workspace | None) -> Ops:
    dtype = config.model_config.dtype
    if workspace is not None:
        return CPUOps(dtype, workspace)
    if config.device.type == "cuda" and config.kernels == "auto" and has_triton():
        from folovllm.ops.triton_ops import TritonOps

        return TritonOps(dtype)
    return TorchOps(dtype)


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


def load_weights(weights: WeightRegistry, files: list[Path]) -> None:
    """Hand every tensor of `files` to the layer that expects it.

    Raises:
        ModelLoadError: an expected tensor is missing, one is not expected, is there twice, or has another shape or
            dtype.
    """
    filled: set[str] = set()
    unexpected: list[str] = []
    maps = [SafetensorsMap(file) for file in files]
    for file, opened in zip(files, maps, strict=True):
        for name in opened:
            if name in weights.optional or name.endswith("rotary_emb.inv_freq"):  # follows from config.json
                continue
            if weights.get(name) is None:
                unexpected.append(name)
                continue
            if name in filled:
                raise ModelLoadError(f"{file} repeats tensor {name}, which another file holds too")
            _fill(weights, opened, name)
            filled.add(name)
    missing = [name for name in weights if name not in filled]
    if missing or unexpected:
        faults = [f"missing: {_shown(missing)}"] if missing else []
        faults += [f"not part of the model: {_shown(unexpected)}"] if unexpected else []
        raise ModelLoadError(f"the weights in {files[0].parent} do not fit config.json; {'; '.join(faults)}")
    weights.finish()
    for opened in maps:
        opened.release_all()  # layers of several tensors read the first ones again when the last comes


def _fill(weights: WeightRegistry, opened: SafetensorsMap, name: str) -> None:
    expected, tensor = weights.get(name), opened.tensor(name)
    assert expected is not None
    if tuple(tensor.shape) != expected.shape:
        raise ModelLoadError(
            f"tensor {name} in {opened.file} has shape {list(tensor.shape)}, config.json implies {list(expected.shape)}"
        )
    try:
        expected.fill(tensor)
    except ModelLoadError as error:
        raise ModelLoadError(f"tensor {name} in {opened.file}: {error}") from error
    opened.release(name)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
