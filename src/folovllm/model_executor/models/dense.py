"""The skeleton of a dense decoder: embedding, N x (attention, gated MLP), norm, output head.

An architecture is a subclass of `DenseForCausalLM` that says where it differs (`DenseTraits`). Layers are named as in
Hugging Face checkpoints. Between layers travel two tensors: the residual stream, and what the last layer adds to it,
which the next norm does in the same pass.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from folovllm.errors import ModelLoadError
from folovllm.model_executor.build import BuildContext
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.embedding import Embedding
from folovllm.model_executor.layers.linear import Linear, OutputHead, Split
from folovllm.model_executor.layers.norm import RMSNorm
from folovllm.model_executor.layers.rotary import rotary_table
from folovllm.ops.abstract import HeadLayout


@dataclass(frozen=True, slots=True)
class DenseTraits:
    """Where dense architectures differ."""

    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head, before the rotation."""
    fused_projections: bool = False
    """The checkpoint holds q, k and v as one `qkv_proj`, and gate and up as one `gate_up_proj`."""


class SelfAttention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, context: BuildContext, traits: DenseTraits, name: str, cos_sin: torch.Tensor) -> None:
        config, backend, tp_size = context.hf_config, context.backend, context.parallel.size
        head_size = backend.head_size
        q_size, kv_size = backend.num_heads * head_size * tp_size, backend.num_kv_heads * head_size * tp_size
        self.qkv_proj = Linear(
            context,
            name,
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=traits.qkv_bias,
            split=Split.OUTPUTS,
            fused="qkv_proj" if traits.fused_projections else None,
        )
        self.o_proj = Linear(
            context, name, q_size, {"o_proj": config.hidden_size}, bias=traits.output_bias, split=Split.INPUTS
        )
        layout = HeadLayout(
            num_heads=backend.num_heads,
            num_kv_heads=backend.num_kv_heads,
            head_size=head_size,
            block_size=backend.block_size,
            cos_sin=cos_sin,
            q_norm=context.vector(f"{name}.q_norm.weight", head_size) if traits.qk_norm else None,
            k_norm=context.vector(f"{name}.k_norm.weight", head_size) if traits.qk_norm else None,
            eps=config.rms_norm_eps,
        )
        self.attn = Attention(context, f"{name}.attn", layout)

    def __call__(self, hidden: torch.Tensor, rotation: Any, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens, hidden_size]` -> the same."""
        return self.o_proj(self.attn(self.qkv_proj(hidden), rotation, context))


class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, context: BuildContext, traits: DenseTraits, name: str) -> None:
        config = context.hf_config
        if config.hidden_act != "silu":
            raise ModelLoadError(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
        size, hidden, bias = config.intermediate_size, config.hidden_size, traits.mlp_bias
        self.gate_up_proj = Linear(
            context,
            name,
            hidden,
            {"gate_proj": size, "up_proj": size},
            bias=bias,
            split=Split.OUTPUTS,
            fused="gate_up_proj" if traits.fused_projections else None,
        )
        self.down_proj = Linear(context, name, size, {"down_proj": hidden}, bias=bias, split=Split.INPUTS)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` -> the same."""
        return self.down_proj(self.gate_up_proj.silu_mul(hidden))


class DecoderLayer:
    """Attention and MLP, each behind its norm and around its residual."""

    def __init__(self, context: BuildContext, traits: DenseTraits, name: str, cos_sin: torch.Tensor) -> None:
        config = context.hf_config
        self.input_layernorm = RMSNorm(context, f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(context, traits, f"{name}.self_attn", cos_sin)
        self.post_attention_layernorm = RMSNorm(
            context, f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps
        )
        self.mlp = GatedMLP(context, traits, f"{name}.mlp")

    def __call__(
        self, update: torch.Tensor | None, residual: torch.Tensor, rotation: Any, context: ForwardContext
    ) -> torch.Tensor:
        """Add `update`, what the layer before found, to `residual` in place; return what this layer finds.

        Both are `[num_tokens, hidden_size]`; the first layer gets no update.
        """
        normed = self.input_layernorm(residual) if update is None else self.input_layernorm.add(update, residual)
        attended = self.self_attn(normed, rotation, context)
        return self.mlp(self.post_attention_layernorm.add(attended, residual))


class DenseForCausalLM:
    """A dense decoder with its output head; subclasses give `traits`.

    Raises:
        ModelLoadError: the checkpoint's config.json asks for something that is not supported.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    """For architectures whose layers are of another shape."""

    def __init__(self, context: BuildContext) -> None:
        config = context.hf_config
        refuse_unsupported(config, context.max_positions)
        traits = self.traits(config)
        self.ops = context.ops
        self.cos_sin = rotary_table(
            config, context.backend.head_size, context.max_positions, context.dtype, context.device
        )
        self.lm_head = OutputHead(context, "lm_head", config.hidden_size, config.vocab_size)
        tied = self.lm_head if self.lm_head.is_tied else None
        self.embed_tokens = Embedding(context, "model.embed_tokens", config.vocab_size, config.hidden_size, tied)
        self.layers = [
            self.layer_class(context, traits, f"model.layers.{i}", self.cos_sin)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(context, "model.norm", config.hidden_size, config.rms_norm_eps)

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """Where this architecture differs from the others."""
        raise NotImplementedError

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`[num_tokens]` int32 ids and int64 positions -> hidden states `[num_tokens, hidden_size]`."""
        residual = self.embed_tokens(input_ids)
        rotation = self.ops.prepare_rotation(self.cos_sin, positions)
        update = None
        for layer in self.layers:
            update = layer(update, residual, rotation, context)
        assert update is not None
        return self.norm.add(update, residual)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` -> fp32 `[num_rows, vocab_size]`, overwritten by the next call."""
        return self.lm_head(hidden)

    def attention_layers(self) -> list[Attention]:
        """The layers that own a KV cache, in order."""
        return [layer.self_attn.attn for layer in self.layers]


def refuse_unsupported(hf_config: PretrainedConfig, max_positions: int) -> None:
    """Refuse what would otherwise be computed wrongly.

    Raises:
        ModelLoadError: sliding-window attention, with a window shorter than requests can get.
    """
    window = getattr(hf_config, "sliding_window", None)
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types:
        is_sliding = "sliding_attention" in layer_types
    else:  # without a list of layers, a window stands for all of them, unless it is switched off
        is_sliding = window is not None and getattr(hf_config, "use_sliding_window", True)
    if is_sliding and (window is None or window < max_positions):
        raise ModelLoadError(
            f"sliding-window attention is not supported: config.json has sliding_window={window}, and requests can be "
            f"{max_positions} tokens long; set max_model_len to at most the window"
        )
