"""Llama 2 and 3, and what is built like them. Mirrors vllm/model_executor/models/llama.py."""

from transformers import PretrainedConfig

from folovllm.model_executor.models.dense import DenseForCausalLM, DenseTraits


class LlamaForCausalLM(DenseForCausalLM):
    """Llama with its output head."""

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """Biases only if config.json says so."""
        attention_bias = getattr(hf_config, "attention_bias", False)
        return DenseTraits(
            qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=getattr(hf_config, "mlp_bias", False)
        )
