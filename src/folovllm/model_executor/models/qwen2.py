"""Qwen2 and Qwen2.5: bias on q, k and v. Mirrors vllm/model_executor/models/qwen2.py."""

from transformers import PretrainedConfig

from folovllm.model_executor.models.dense import DenseForCausalLM, DenseTraits


class Qwen2ForCausalLM(DenseForCausalLM):
    """Qwen2 with its output head."""

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """q, k and v always have a bias."""
        return DenseTraits(qkv_bias=True)
