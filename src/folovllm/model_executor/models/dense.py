"""The skeleton of a dense decoder: embedding, N x (attention, gated MLP), norm, output head.

An architecture is a subclass of `DenseForCausalLM` that says where it differs (`DenseTraits`). Module and parameter
names are those of Hugging Face checkpoints, except that q/k/v and gate/up are merged (layers/linear.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.errors import ModelLoadError
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.linear import Linear, MergedLinear
from folovllm.model_executor.layers.norm import RMSNorm
from folovllm.model_executor.layers.rotary import RotaryEmbedding, rotate

Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class DenseTraits:
    """Where dense architectures differ."""

    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before the rotation."""


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, hf_config: PretrainedConfig, traits: DenseTraits, name: str, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = backend.num_heads, backend.num_kv_heads
        self.head_size = backend.head_size
        self.q_size, self.kv_size = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        hidden = hf_config.hidden_size
        parts = {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        self.qkv_proj = MergedLinear(hidden, parts, bias=traits.qkv_bias)
        self.o_proj = Linear(self.q_size, hidden, bias=traits.output_bias)
        self.q_norm = RMSNorm(self.head_size, hf_config.rms_norm_eps) if traits.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, hf_config.rms_norm_eps) if traits.qk_norm else None
        self.attn = Attention(f"{name}.attn", backend)

    def forward(self, hidden: torch.Tensor, angles: Angles, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens, hidden_size]` -> the same."""
        q, k, v = self.qkv_proj(hidden).split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        query = q.reshape(-1, self.num_heads, self.head_size)
        key = k.reshape(-1, self.num_kv_heads, self.head_size)
        value = v.reshape(-1, self.num_kv_heads, self.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = self.attn(rotate(query, angles), rotate(key, angles), value, context)
        output: torch.Tensor = self.o_proj(attended)
        return output


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hf_config: PretrainedConfig) -> None:
        super().__init__()
        if hf_config.hidden_act != "silu":
            raise ModelLoadError(f"hidden_act {hf_config.hidden_act!r} is not supported; supported: silu")
        size = hf_config.intermediate_size
        self.gate_up_proj = MergedLinear(hf_config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, hf_config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` -> the same."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        output: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return output


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and around its residual."""

    def __init__(self, hf_config: PretrainedConfig, traits: DenseTraits, name: str, backend: AttentionBackend) -> None:
        super().__init__()
        self.self_attn = SelfAttention(hf_config, traits, f"{name}.self_attn", backend)
        self.mlp = GatedMLP(hf_config)
        self.input_layernorm = RMSNorm(hf_config.hidden_size, hf_config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hf_config.hidden_size, hf_config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, angles: Angles, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens, hidden_size]` -> the same."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles, context)
        mlp: torch.Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + mlp


class Embedding(nn.Module):
    """Token id -> row of `weight` `[vocab_size, hidden_size]`."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` -> `[num_tokens, hidden_size]`."""
        return F.embedding(input_ids, self.weight)


class DenseModel(nn.Module):
    """Everything below the output head."""

    def __init__(
        self, hf_config: PretrainedConfig, traits: DenseTraits, backend: AttentionBackend, max_positions: int
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(hf_config.vocab_size, hf_config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(hf_config, traits, f"model.layers.{i}", backend) for i in range(hf_config.num_hidden_layers)
        )
        self.norm = RMSNorm(hf_config.hidden_size, hf_config.rms_norm_eps)
        self.rotary = RotaryEmbedding(hf_config, backend.head_size, max_positions)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens]` ids and positions -> `[num_tokens, hidden_size]`."""
        hidden = self.embed_tokens(input_ids)
        angles = self.rotary.angles(positions)
        for layer in self.layers:
            hidden = layer(hidden, angles, context)
        output: torch.Tensor = self.norm(hidden)
        return output


class DenseForCausalLM(nn.Module):
    """A dense decoder with its output head; subclasses give `traits`.

    Raises:
        ModelLoadError: the checkpoint's config.json asks for something that is not supported.
    """

    def __init__(self, hf_config: PretrainedConfig, backend: AttentionBackend, max_positions: int) -> None:
        super().__init__()
        refuse_unsupported(hf_config)
        self.model = DenseModel(hf_config, self.traits(hf_config), backend, max_positions)
        self.lm_head = (
            Linear.sharing(self.model.embed_tokens.weight)
            if hf_config.tie_word_embeddings
            else Linear(hf_config.hidden_size, hf_config.vocab_size)
        )

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """Where this architecture differs from the others."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens]` ids and positions -> hidden states `[num_tokens, hidden_size]`."""
        hidden: torch.Tensor = self.model(input_ids, positions, context)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` -> `[num_rows, vocab_size]`, in the model's dtype."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def attention_layers(self) -> list[Attention]:
        """The layers that own a KV cache, in order."""
        return [module for module in self.modules() if isinstance(module, Attention)]


def refuse_unsupported(hf_config: PretrainedConfig) -> None:
    """Refuse what would otherwise be computed wrongly.

    Raises:
        ModelLoadError: sliding-window attention or quantised weights.
    """
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or ()):
        raise ModelLoadError(
            f"config.json enables sliding-window attention (sliding_window={hf_config.sliding_window}), "
            "which is not supported; only full attention is"
        )
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelLoadError(f"quantised checkpoints are not supported (quantization_config: {method})")
