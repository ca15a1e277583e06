"""Mistral from version 0.2 on (full attention). Mirrors vllm/model_executor/models/mistral.py."""

from transformers import PretrainedConfig

from folovllm.model_executor.models.dense import DenseForCausalLM, DenseTraits


class MistralForCausalLM(DenseForCausalLM):
    """Mistral with its output head."""

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """No biases and no norms of heads."""
        return DenseTraits()
