"""Checkpoints with random weights, written without building a model: only the shape matters to speed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int = 40960

    @property
    def kv_bytes_per_token(self) -> int:
        """bf16 K and V of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    @property
    def linear_parameters(self) -> int:
        """Parameters that each token of a prompt is multiplied with (the output head is not)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_bytes(self) -> int:
        """bf16 bytes that a decode step reads: the layers and the output head, tied to the embedding."""
        return 2 * (self.linear_parameters + self.vocab * self.hidden)


QWEN3_06B = ModelShape(1024, 28, 16, 8, 128, 3072, 151936)
TINY_5M = ModelShape(256, 4, 4, 2, 64, 768, 6144, 4096)
"""About 5M parameters: its step is host overhead before all else."""


def write_checkpoint(directory: Path, shape: ModelShape, seed: int = 0) -> Path:
    """A bf16 checkpoint of the shape; the same bytes every time."""
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": _random(shape.vocab, shape.hidden),
        "model.norm.weight": _ones(shape.hidden),
    }
    for i in range(shape.layers):
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in _layer(shape).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=1))
    return directory


def write_gptq_checkpoint(
    directory: Path, shape: ModelShape, group_size: int, head_bits: int = 16, seed: int = 0
) -> Path:
    """The same shape with random symmetric 4-bit weights in the layers, as GPTQ checkpoints have them.

    With `head_bits` 16 the output head is the bf16 embedding; with 4 or 8 it has quantised weights of its own.
    """
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": _random(shape.vocab, shape.hidden),
        "model.norm.weight": _ones(shape.hidden),
    }
    for i in range(shape.layers):
        for name, tensor in _layer(shape).items():
            if tensor.dim() == 1:
                tensors[f"model.layers.{i}.{name}"] = tensor
            else:
                prefix = f"model.layers.{i}.{name.removesuffix('.weight')}"
                tensors |= {f"{prefix}.{part}": t for part, t in _gptq(*tensor.shape, group_size, 4).items()}
    if head_bits != 16:
        head = _gptq(shape.vocab, shape.hidden, group_size, head_bits)
        tensors |= {f"lm_head.{part}": tensor for part, tensor in head.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True, "desc_act": False}
    quantization |= {"checkpoint_format": "gptq_v2", "lm_head": head_bits != 16}
    if head_bits == 8:
        quantization["dynamic"] = {"lm_head": {"bits": 8}}
    config = _config(shape) | {"quantization_config": quantization, "tie_word_embeddings": head_bits == 16}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def _gptq(outputs: int, inputs: int, group_size: int, bits: int) -> dict[str, torch.Tensor]:
    groups, pack = inputs // group_size, 32 // bits
    words = torch.iinfo(torch.int32)
    zeros = {4: 0x88888888, 8: 0x80808080}[bits] - (1 << 32)
    deviation = ((4**bits - 1) / 12) ** 0.5  # of integers that are all as likely
    return {
        "qweight": torch.randint(words.min, words.max, (inputs // pack, outputs), dtype=torch.int32),
        "qzeros": torch.full((groups, outputs // pack), zeros, dtype=torch.int32),
        "scales": torch.full((groups, outputs), inputs**-0.5 / deviation, dtype=torch.float16),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group_size,
    }


def _layer(shape: ModelShape) -> dict[str, torch.Tensor]:
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "input_layernorm.weight": _ones(shape.hidden),
        "post_attention_layernorm.weight": _ones(shape.hidden),
        "self_attn.q_norm.weight": _ones(shape.head_dim),
        "self_attn.k_norm.weight": _ones(shape.head_dim),
        "self_attn.q_proj.weight": _random(q_size, shape.hidden),
        "self_attn.k_proj.weight": _random(kv_size, shape.hidden),
        "self_attn.v_proj.weight": _random(kv_size, shape.hidden),
        "self_attn.o_proj.weight": _random(shape.hidden, q_size),
        "mlp.gate_proj.weight": _random(shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": _random(shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": _random(shape.hidden, shape.intermediate),
    }


def _random(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * columns**-0.5).bfloat16()


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
    }
