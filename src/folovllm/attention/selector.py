"""Which attention backend runs: the first that supports the device and shape, or the one that is forced."""

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.backends.flash_attn import FlashAttnBackend
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.errors import ConfigError

# Best first: the automatic choice takes the first that supports the case.
BACKENDS: tuple[type[AttentionBackend], ...] = (PagedBackend, FlashAttnBackend, TorchNaiveBackend)


def select_backend(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> type[AttentionBackend]:
    """The backend class for `name`, where "auto" chooses.

    Raises:
        ConfigError: no such backend, or it does not support this device and shape.
    """
    able = [backend for backend in BACKENDS if backend.supports(device, dtype, head_size)]
    if name == "auto":
        return able[0]
    for backend in able:
        if backend.name == name:
            return backend
    allowed = ", ".join(["auto", *(backend.name for backend in able)])
    raise ConfigError(
        f"attention_backend={name!r} cannot serve {dtype} with head size {head_size} on {device.type}; "
        f"it must be one of {allowed}"
    )
