"""Which attention backend runs: the first that supports the device and shape, or the one that is forced."""

import logging

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.backends.flash_attn import FlashAttnBackend
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.backends.triton_unified import TritonUnifiedBackend
from folovllm.errors import ConfigError

logger = logging.getLogger(__name__)

# Best first: the automatic choice takes the first that supports the case.
BACKENDS: tuple[type[AttentionBackend], ...] = (
    PagedBackend,
    TritonUnifiedBackend,
    FlashAttnBackend,
    TorchNaiveBackend,
)


def select_backend(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> type[AttentionBackend]:
    """The backend class for `name`, where "auto" chooses.

    Raises:
        ConfigError: no such backend, it does not support this device and shape, or what it needs is not installed.
    """
    able = [backend for backend in BACKENDS if backend.supports(device, dtype, head_size)]
    if name == "auto":
        return _first_complete(able)
    for backend in able:
        if backend.name == name:
            if (package := backend.missing_package()) is not None:
                raise ConfigError(
                    f"attention_backend={name!r} needs the package {package}, which is not installed; "
                    "install it, or use auto"
                )
            return backend
    allowed = ", ".join(["auto", *(backend.name for backend in able)])
    raise ConfigError(
        f"attention_backend={name!r} cannot serve {dtype} with head size {head_size} on {device.type}; "
        f"it must be one of {allowed}"
    )


def _first_complete(able: list[type[AttentionBackend]]) -> type[AttentionBackend]:
    for backend in able:
        package = backend.missing_package()
        if package is None:
            return backend
        logger.warning("package %s is not installed: the faster attention backend %s cannot run", package, backend.name)
    raise AssertionError("torch_naive runs everywhere")
