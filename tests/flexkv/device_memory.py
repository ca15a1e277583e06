"""A small model, its KV tensors in the layouts engines use, and the store, device worker and memory as one thing."""

from dataclasses import dataclass

import numpy as np
import torch

from flexkv.common.config import ModelConfig
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

torch.set_num_threads(1)

BLOCK = 4
MODEL = ModelConfig(num_layers=2, num_kv_heads=3, head_size=8, dtype="float32", model_id="test")


def make_kv_caches(model: ModelConfig, num_blocks: int, tokens_per_block: int, order: str = "bkhte") -> dict:
    """Zeroed KV tensors in vLLM's logical shape [blocks, kv, heads, tokens, element], laid out in memory as `order`."""
    sizes = {
        "b": num_blocks,
        "k": model.kv_dim,
        "h": model.num_kv_heads,
        "t": tokens_per_block,
        "e": model.head_size,
    }
    shape = [sizes[dim] for dim in order]
    to_logical = [order.index(dim) for dim in "bkhte"]
    dtype = getattr(torch, model.dtype)
    return {f"layer.{i}": torch.zeros(shape, dtype=dtype).permute(to_logical) for i in range(model.num_layers)}


def fill_block(kv_caches: dict, block: int, seed: int) -> None:
    """Give a device block bytes that follow from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in kv_caches.values():
        raw = torch.randint(0, 100, tensor[block].shape, generator=generator)
        tensor[block] = raw.to(tensor.dtype)


def read_block(kv_caches: dict, block: int) -> bytes:
    """The bytes of a device block, all layers."""
    return b"".join(t[block].contiguous().view(torch.uint8).numpy().tobytes() for t in kv_caches.values())


def slots_of(blocks: list[int], tokens_per_block: int = BLOCK) -> np.ndarray:
    """The slots of whole device blocks."""
    return (np.asarray(blocks)[:, None] * tokens_per_block + np.arange(tokens_per_block)).ravel()


@dataclass
class Stack:
    """A store, its device worker and the device memory."""

    store: KVManager
    client: KVTPClient
    kv_caches: dict

    def put(self, tokens: list[int], blocks: list[int]) -> int:
        """Store the full blocks of `tokens` from device `blocks` and wait; return how many were stored."""
        count = len(tokens) // BLOCK
        task = self.store.put_async(tokens[: count * BLOCK], slots_of(blocks[:count]))
        return self.store.wait([task], completely=True)[task].num_blocks
