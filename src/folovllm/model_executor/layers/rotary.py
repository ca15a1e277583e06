"""Rotary position embedding. The scaled frequencies come from transformers, so that they are the same numbers."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from folovllm.errors import ModelLoadError

# The others ("dynamic", "longrope") change the frequencies with the length of the running sequence: keys already in the
# cache would be rotated by other angles than the query, and a request would depend on its neighbours.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RotaryEmbedding(nn.Module):
    """cos and sin of every position, computed once; `rotate` turns the two halves of a head against each other."""

    cos_sin: torch.Tensor
    """`[max_positions, head_size]`: cos of head_size / 2 angles, then sin."""

    def __init__(self, hf_config: PretrainedConfig, head_size: int, max_positions: int) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        with torch.device("cpu"):  # the same bits on every device
            inv_freq, scaling = inverse_frequencies(hf_config, head_size)
            angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq.float()
            cos_sin = torch.cat((angles.cos() * scaling, angles.sin() * scaling), dim=-1).to(dtype)
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of `positions` `[num_tokens]`, each `[num_tokens, 1, head_size / 2]`; shared by all layers."""
        cos, sin = self.cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `[num_tokens, num_heads, head_size]` by the angles of its tokens."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
