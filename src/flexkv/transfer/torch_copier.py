"""Copies between the pool and tensors on any torch device, through a pinned staging buffer and an own stream.

pool --gather--> staging (pinned) --stream--> device --index copy--> KV tensor       and back
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from flexkv.common.storage import DeviceLayout
from flexkv.common.transfer import BlockIds
from flexkv.storage.allocator import CpuPool

if TYPE_CHECKING:
    import torch  # at run time only where it is used: the store itself does without

_STAGING_BYTES: Final = 32 * 2**20


class TorchCopier:
    """A `DeviceCopier` for devices that torch reaches. Copies layer by layer, many blocks at a time."""

    def __init__(self, kv_caches: Mapping[str, Any], layout: DeviceLayout, pool: CpuPool, rank_offset: int) -> None:
        """Take the tensors and the pool; the staging buffer holds at least one layer of one block."""
        import torch

        tensors: list[torch.Tensor] = list(kv_caches.values())
        self._device = tensors[0].device
        self._shape = [dim.size for dim in layout.dims]
        self._layers = [tensor.permute(layout.permutation) for tensor in tensors]  # [num_blocks, *dims]
        rows = torch.from_numpy(pool.blocks())[:, rank_offset : rank_offset + layout.block_bytes]
        self._pool = rows.view(-1, layout.num_layers, layout.layer_bytes)  # uint8 [num_blocks, layer, layer_bytes]
        self._limits = (layout.num_blocks, pool.layout.num_blocks, layout.num_layers)
        self._chunk = max(1, _STAGING_BYTES // layout.layer_bytes)
        self._is_cuda = self._device.type == "cuda"
        self._staging = torch.empty((self._chunk, layout.layer_bytes), dtype=torch.uint8, pin_memory=self._is_cuda)
        self._stream: torch.cuda.Stream | None = None
        if self._is_cuda:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def wait_for_engine(self) -> None:
        """Order later copies after the work the calling thread has queued on its stream."""
        if self._stream is not None:
            import torch

            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(
        self, *, to_device: bool, device_blocks: BlockIds, pool_blocks: BlockIds, first_layer: int, num_layers: int
    ) -> None:
        """Copy block i of one side to block i of the other; see `DeviceCopier.copy`."""
        import torch

        self._check(device_blocks, pool_blocks, first_layer, num_layers)
        with torch.cuda.stream(self._stream), torch.inference_mode():
            for start in range(0, len(device_blocks), self._chunk):
                on_device = torch.from_numpy(device_blocks[start : start + self._chunk]).to(self._device)
                on_host = torch.from_numpy(pool_blocks[start : start + self._chunk])
                for layer in range(first_layer, first_layer + num_layers):
                    move = self._load if to_device else self._store
                    move(layer, on_device, on_host)

    def _load(self, layer: int, on_device: torch.Tensor, on_host: torch.Tensor) -> None:
        import torch

        target = self._layers[layer]
        staged = self._staging[: len(on_host)]
        torch.index_select(self._pool[:, layer], 0, on_host, out=staged)
        blocks = staged.to(self._device, non_blocking=True).view(target.dtype).view(-1, *self._shape)
        target[on_device] = blocks
        self._synchronize()

    def _store(self, layer: int, on_device: torch.Tensor, on_host: torch.Tensor) -> None:
        import torch

        blocks = self._layers[layer][on_device].reshape(len(on_host), -1).view(torch.uint8)
        staged = self._staging[: len(on_host)]
        staged.copy_(blocks, non_blocking=True)
        self._synchronize()
        self._pool[:, layer].index_copy_(0, on_host, staged)

    def _synchronize(self) -> None:
        # The staging buffer is used again next, and the caller may rely on the bytes.
        if self._stream is not None:
            self._stream.synchronize()

    def _check(self, device_blocks: BlockIds, pool_blocks: BlockIds, first_layer: int, num_layers: int) -> None:
        num_device_blocks, num_pool_blocks, all_layers = self._limits
        for side, ids, limit in (("device", device_blocks, num_device_blocks), ("pool", pool_blocks, num_pool_blocks)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
                raise IndexError(f"{side} blocks {int(ids.min())}..{int(ids.max())} are not within 0..{limit - 1}")
        if not 0 <= first_layer <= first_layer + num_layers <= all_layers:
            raise IndexError(f"layers from {first_layer}, {num_layers} of them, exceed the {all_layers} registered")
