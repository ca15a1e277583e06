"""Random-weight checkpoints of every shape the engine must serve, written through transformers.

The weights are scaled so that the logits spread over several units: the greedy choice is then decided by far more than
the rounding by which two correct implementations differ.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

MAX_POSITIONS = 256
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Shape:
    """One architecture variant."""

    name: str
    config_class: type[PretrainedConfig]
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    tied: bool
    head_dim: int | None = None
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    extra: dict[str, Any] = field(default_factory=dict)

    def hf_config(self, dtype: torch.dtype) -> PretrainedConfig:
        """The transformers config of this shape."""
        options = {"head_dim": self.head_dim} if self.head_dim else {}
        return self.config_class(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 2 + 8,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=self.tied,
            rope_parameters=dict(self.rope),
            dtype=dtype,
            **options,
            **self.extra,
        )


Q2, Q3 = Qwen2Config, Qwen3Config
NO_EOS = {"bos_token_id": None, "eos_token_id": None}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-1layer-mha", Q3, 32, 4, 4, 1, 101, tied=False, head_dim=8),
        Shape("qwen3-wide-heads-gqa2", Q3, 48, 4, 2, 2, 257, tied=True, head_dim=32),
        Shape("qwen3-gqa8-bias", Q3, 64, 8, 1, 3, 500, tied=False, head_dim=16, extra={"attention_bias": True}),
        Shape("qwen3-theta1e6-6layers", Q3, 64, 4, 1, 6, 331, True, 24, {"rope_type": "default", "rope_theta": 1e6}),
        Shape("qwen3-yarn", Q3, 64, 6, 3, 2, 199, tied=False, head_dim=16, rope=YARN_ROPE),
        Shape("qwen3-llama3", Q3, 32, 4, 2, 3, 300, tied=True, head_dim=16, rope=LLAMA3_ROPE),
        Shape("qwen2-gqa7", Q2, 56, 7, 1, 2, 211, tied=True),
        Shape("qwen2-mha-5layers", Q2, 48, 3, 3, 5, 150, tied=False),
        Shape(
            "qwen2-linear-gqa4",
            Q2,
            64,
            8,
            2,
            4,
            97,
            False,
            None,
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        Shape("qwen2-yarn-gqa3", Q2, 48, 6, 2, 2, 123, tied=True, rope=YARN_ROPE),
        Shape("llama-rope3", LlamaConfig, 64, 4, 2, 2, 173, tied=False, rope=LLAMA3_ROPE),
        Shape(
            "llama-biases",
            LlamaConfig,
            48,
            6,
            6,
            2,
            140,
            True,
            16,
            extra={"attention_bias": True, "mlp_bias": True, **NO_EOS},
        ),
        Shape("mistral-full", MistralConfig, 64, 8, 2, 2, 160, False, 16, extra={"sliding_window": None, **NO_EOS}),
        Shape(
            "phi3-gqa4-window",  # as wide as the context, so that it changes nothing
            Phi3Config,
            64,
            8,
            2,
            2,
            182,
            False,
            extra={"sliding_window": MAX_POSITIONS, "pad_token_id": None, **NO_EOS},
        ),
    )
}


def make_checkpoint(directory: Path, shape: Shape, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
    """Write the checkpoint of `shape` to `directory`, in several files if `shards`; the same bytes every time."""
    config = shape.hf_config(dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(sum(map(ord, shape.name)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 2.0 / parameter.shape[1] ** 0.5)
    size = {"max_shard_size": 20_000} if shards else {}
    model.to(dtype).save_pretrained(directory, **size)
    return directory
