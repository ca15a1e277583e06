"""Architecture name in config.json -> class. A new model is a file here and a line below."""

from transformers import PretrainedConfig

from folovllm.errors import ModelLoadError
from folovllm.model_executor.models.dense import DenseForCausalLM
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.models.mistral import MistralForCausalLM
from folovllm.model_executor.models.phi3 import Phi3ForCausalLM
from folovllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from folovllm.model_executor.models.qwen3 import Qwen3ForCausalLM

MODELS: dict[str, type[DenseForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def resolve_model_class(hf_config: PretrainedConfig) -> type[DenseForCausalLM]:
    """The class of the checkpoint's architecture.

    Raises:
        ModelLoadError: none of its architectures is supported; the message lists those that are.
    """
    named = list(getattr(hf_config, "architectures", None) or [])
    for architecture in named:
        if architecture in MODELS:
            return MODELS[architecture]
    supported = ", ".join(MODELS)
    raise ModelLoadError(f"architecture {', '.join(named) or '(none named)'} is not supported; supported: {supported}")
