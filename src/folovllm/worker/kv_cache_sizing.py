"""How many KV blocks a CUDA device has room for, found by running the largest step that there can be.

Mirrors `determine_available_memory` and `profile_run` of vllm/v1/worker/gpu_worker.py.

    total memory of the card
    |<------------------ gpu_memory_utilization ------------------>|  left alone: CUDA graphs, fragments
    | in use: weights, other programs | largest step |  KV blocks  |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.config import EngineConfig, fit_to_pool
from folovllm.errors import ConfigError
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.parallel import TensorParallel


class ProfiledModel(Protocol):
    """What the largest step needs of a model."""

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens]` ids and positions to hidden states."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden_size]` to `[n, vocab_size]`."""

    def attention_layers(self) -> list[Attention]:
        """The layers that own a KV cache."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Of the device, once the model is loaded and the largest step has run."""

    total_bytes: int
    free_bytes: int
    """Outside the step."""
    step_bytes: int
    """What the step takes beyond that, at its peak."""


def num_blocks_that_fit(profile: MemoryProfile, utilization: float, block_bytes: int) -> int:
    """Blocks in what is left of `utilization` of the device's memory.

    Raises:
        ConfigError: not even two.
    """
    in_use = profile.total_bytes - profile.free_bytes
    num_blocks = int(profile.total_bytes * utilization - in_use - profile.step_bytes) // block_bytes
    if num_blocks < 2:
        gib = 2.0**30
        raise ConfigError(
            f"no room for a KV cache: of {profile.total_bytes / gib:.1f} GiB, {in_use / gib:.1f} are in use and a step "
            f"takes {profile.step_bytes / gib:.1f}; raise gpu_memory_utilization={utilization}, lower "
            "max_num_batched_tokens, or free memory of the device"
        )
    return num_blocks


def profile_memory(run: Callable[[], None], device: torch.device) -> MemoryProfile:
    """Measure the second `run` on a CUDA device: compilers and libraries allocate at their first call."""
    run()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return MemoryProfile(total_bytes, free_bytes, step_bytes)


def largest_step(config: EngineConfig) -> list[int]:
    """Lengths of the prompts that fill the token budget, as few as can be."""
    limits, max_len = config.scheduler_config, config.model_config.max_model_len
    num_tokens = min(limits.max_num_batched_tokens, limits.max_num_seqs * max_len)
    lengths = [max_len] * (num_tokens // max_len)
    return [*lengths, num_tokens % max_len] if num_tokens % max_len else lengths


@torch.inference_mode()
def run_largest_step(config: EngineConfig, model: ProfiledModel, backend: AttentionBackend) -> None:
    """Compute `largest_step`, and the logits and probabilities of the most rows that can be sampled."""
    device, dtype, block_size = config.device, config.model_config.dtype, config.cache_config.block_size
    lengths = np.array(largest_step(config), dtype=np.int32)
    num_tokens = int(lengths.sum())
    columns = -(-int(lengths.max()) // block_size)
    tables = (1 + np.arange(len(lengths) * columns, dtype=np.int32)).reshape(len(lengths), columns)
    positions = np.concatenate([np.arange(n) for n in lengths])
    blocks = np.concatenate([np.repeat(table, block_size)[:n] for table, n in zip(tables, lengths, strict=True)])
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    offsets = positions % block_size

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    metadata = AttentionMetadata(
        query_start_loc=put(start),
        seq_lens=put(lengths),
        block_tables=put(tables),
        slot_mapping=put(blocks.astype(np.int64) * block_size + offsets),
        slot_blocks=put(blocks.astype(np.int64)),
        slot_offsets=put(offsets),
        query_start_loc_cpu=start,
        seq_lens_cpu=lengths,
    )
    metadata = replace(metadata, backend_plan=backend.plan(metadata))
    shape = (1 + tables.size, 2, backend.num_kv_heads, block_size, backend.head_size)
    shared = torch.zeros(shape, dtype=dtype, device=device)  # by all layers: only its size matters
    context = ForwardContext(metadata, {layer.layer_name: shared for layer in model.attention_layers()})
    hidden = model(torch.zeros(num_tokens, dtype=torch.int32, device=device), put(positions), context)
    logits = model.compute_logits(hidden[: config.scheduler_config.max_num_seqs])
    torch.softmax(logits.float() / 2.0, dim=-1)


def size_kv_cache(
    config: EngineConfig, model: ProfiledModel, backend: AttentionBackend, parallel: TensorParallel
) -> EngineConfig:
    """The configuration with as many blocks as every rank's CUDA device has room for.

    Raises:
        ConfigError: there is no room.
    """
    profile = profile_memory(lambda: run_largest_step(config, model, backend), config.device)
    own = num_blocks_that_fit(profile, config.cache_config.gpu_memory_utilization, config.kv_block_bytes)
    every = parallel.all_gather(torch.tensor([[own]], dtype=torch.int64, device=config.device))
    return fit_to_pool(config, int(every.min()))
