"""Rotary position embedding. The scaled frequencies come from transformers, so that they are the same numbers."""

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from folovllm.errors import ModelLoadError

# The others ("dynamic", "longrope") change the frequencies with the length of the running sequence: keys already in the
# cache would be rotated by other angles than the query, and a request would depend on its neighbours.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rotary_table(
    hf_config: PretrainedConfig, head_size: int, max_positions: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """cos and sin of every position, shared by all layers.

    Returns:
        `[max_positions, head_size]`: cos of head_size / 2 angles, then sin.

    Raises:
        ModelLoadError: a rope type that is not supported.
    """
    inv_freq, scaling = inverse_frequencies(hf_config, head_size)  # on the host: the same bits on every device
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq.float()
    return torch.cat((angles.cos() * scaling, angles.sin() * scaling), dim=-1).to(device, dtype)


def inverse_frequencies(hf_config: PretrainedConfig, head_size: int) -> tuple[torch.Tensor, float]:
    """The `head_size / 2` frequencies in radians per token, and the factor on cos and sin.

    Raises:
        ModelLoadError: a rope type that is not supported.
    """
    parameters: dict[str, Any] = hf_config.rope_parameters or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ModelLoadError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError("partial_rotary_factor is not supported: the whole head must be rotated")
    if rope_type == "default":
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config)
    return inv_freq, float(scaling)
