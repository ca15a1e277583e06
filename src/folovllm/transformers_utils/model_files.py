"""The few facts of a checkpoint's configuration that the front end needs, read without `transformers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.errors import ModelLoadError
from folovllm.transformers_utils.tokenizer import read_json

_DEFAULTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What config.json and generation_config.json say."""

    vocab_size: int
    """Rows of the embedding table: prompt token ids are below it."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a generation, apart from the tokenizer's own."""
    default_sampling: dict[str, Any]
    """Sampling options the model's authors recommend: used where a request does not say otherwise, as vLLM does."""


def read_model_facts(directory: Path) -> ModelFacts:
    """Read them from a checkpoint directory.

    Raises:
        ModelLoadError: config.json is missing or names no vocabulary size.
    """
    config = read_json(directory / "config.json")
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ModelLoadError(f"{directory / 'config.json'} is missing or has no vocab_size")
    generation = read_json(directory / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [eos]
    return ModelFacts(
        vocab_size=vocab_size,
        eos_token_ids=tuple(i for i in eos_ids if isinstance(i, int)),
        default_sampling={name: generation[name] for name in _DEFAULTABLE if generation.get(name) is not None},
    )
