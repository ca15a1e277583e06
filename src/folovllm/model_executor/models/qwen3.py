"""Qwen3: RMSNorm on each query and key head. Mirrors vllm/model_executor/models/qwen3.py."""

from transformers import PretrainedConfig

from folovllm.model_executor.models.dense import DenseForCausalLM, DenseTraits


class Qwen3ForCausalLM(DenseForCausalLM):
    """Qwen3 with its output head."""

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """Query and key heads are normalised; biases only if config.json says so."""
        return DenseTraits(qkv_bias=hf_config.attention_bias, output_bias=hf_config.attention_bias, qk_norm=True)
