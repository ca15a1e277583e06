"""Copies between one rank's KV tensors and the pool: the contract, and the native copier for tensors in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flexkv import _native
from flexkv.common.storage import DeviceLayout
from flexkv.common.transfer import BlockIds
from flexkv.errors import ConfigError
from flexkv.storage.allocator import CpuPool


class DeviceCopier(Protocol):
    """Moves blocks; called by one thread, the device worker's."""

    def wait_for_engine(self) -> None:
        """Called by the engine's thread when it releases tasks: later copies come after what it has queued so far."""
        ...

    def copy(
        self, *, to_device: bool, device_blocks: BlockIds, pool_blocks: BlockIds, first_layer: int, num_layers: int
    ) -> None:
        """Copy block i of one side to block i of the other; returns when the bytes have arrived.

        Raises:
            IndexError: a block or layer out of range; nothing was copied.
        """
        ...


class HostCopier:
    """Copies tensors in host memory natively, by their own strides, on several threads and without the GIL."""

    def __init__(
        self, kv_caches: Mapping[str, Any], layout: DeviceLayout, pool: CpuPool, rank_offset: int, num_threads: int
    ) -> None:
        """Take the tensors and the pool; both stay referenced, so that their memory outlives the copier."""
        self._tensors = list(kv_caches.values())
        self._pool = pool
        device = _native.DeviceSide(
            layers=[tensor.data_ptr() for tensor in self._tensors],
            num_blocks=layout.num_blocks,
            block_stride=layout.block_stride,
            dims=[(dim.size, dim.stride) for dim in layout.dims],
            element_bytes=layout.element_bytes,
        )
        pool_side = _native.PoolSide(
            base=pool.address,
            num_blocks=pool.layout.num_blocks,
            block_stride=pool.layout.block_stride,
            offset=rank_offset,
        )
        self._transfer = _native.HostTransfer(device, pool_side, num_threads)

    def wait_for_engine(self) -> None:
        """Return at once: what the engine has computed on this device is in memory."""

    def copy(
        self, *, to_device: bool, device_blocks: BlockIds, pool_blocks: BlockIds, first_layer: int, num_layers: int
    ) -> None:
        """Copy block i of one side to block i of the other; see `DeviceCopier.copy`."""
        self._transfer.copy(
            to_device=to_device,
            device_blocks=device_blocks,
            pool_blocks=pool_blocks,
            first_layer=first_layer,
            num_layers=num_layers,
        )


def make_copier(
    kv_caches: Mapping[str, Any], layout: DeviceLayout, pool: CpuPool, rank_offset: int, num_threads: int
) -> DeviceCopier:
    """Return the copier for the device these tensors are on.

    Raises:
        ConfigError: the tensors are on several devices.
    """
    devices = {str(tensor.device) for tensor in kv_caches.values()}
    if len(devices) != 1:
        raise ConfigError(f"the KV tensors of one rank are on several devices: {', '.join(sorted(devices))}")
    if devices == {"cpu"}:
        return HostCopier(kv_caches, layout, pool, rank_offset, num_threads)
    from flexkv.transfer.torch_copier import TorchCopier

    return TorchCopier(kv_caches, layout, pool, rank_offset)
