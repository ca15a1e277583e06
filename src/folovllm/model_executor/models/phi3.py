"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another. Mirrors vllm/model_executor/models/phi3.py."""

from transformers import PretrainedConfig

from folovllm.model_executor.models.dense import DenseForCausalLM, DenseTraits


class Phi3ForCausalLM(DenseForCausalLM):
    """Phi-3 with its output head."""

    @staticmethod
    def traits(hf_config: PretrainedConfig) -> DenseTraits:
        """No biases; the checkpoint holds qkv_proj and gate_up_proj."""
        return DenseTraits(fused_projections=True)
