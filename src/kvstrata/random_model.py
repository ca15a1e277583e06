"""Qwen3 checkpoints of any size with random weights, made on the spot, for benchmarks and tests.

The model babbles; everything else about it is real: the files are what `transformers` would save, and any engine that
serves Qwen3 can serve it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvstrata.demo_model import DEMO_MODEL

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class RandomModelShape:
    """Size of the model: as it stands about 12 million parameters, 50 MB in float32."""

    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1152
    vocab_size: int = 2048
    """Rows of the embedding table; no fewer than the tokenizer has tokens, which are the demo model's."""
    max_position_embeddings: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 7


def make_random_model(directory: Path, shape: RandomModelShape | None = None) -> Path:
    """Write a checkpoint (config.json, model.safetensors, tokenizer with chat template) into `directory`.

    A directory that already holds the same shape is left as it is.

    Returns:
        `directory`.

    Raises:
        ValueError: the shape's vocabulary is smaller than the tokenizer's.
    """
    shape = shape or RandomModelShape()
    done = directory / "random_shape.json"
    stamp = json.dumps({name: getattr(shape, name) for name in shape.__slots__})
    if done.is_file() and done.read_text() == stamp:
        return directory
    vocabulary = _vocabulary()
    if shape.vocab_size < len(vocabulary):
        raise ValueError(f"vocab_size={shape.vocab_size} is less than the tokenizer's {len(vocabulary)} tokens")
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO_MODEL / name, directory / name)
    _write_weights(directory, shape, vocabulary)
    done.write_text(stamp)
    return directory


def _vocabulary() -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    return dict(tokenizer.get_vocab())


def _write_weights(directory: Path, shape: RandomModelShape, vocabulary: dict[str, int]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary["<|im_end|>"],
        dtype=shape.dtype,
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model = Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype))
    # A logit of exactly 0 is never the largest of thousands: the model babbles in whole words, not in broken bytes,
    # and a turn ends by its length, so that every run does the same work.
    words = [i for token, i in vocabulary.items() if token[0] == "Ġ" and token[1:].isalpha() and token.isprintable()]
    silent = torch.ones(shape.vocab_size, dtype=torch.bool)
    silent[words] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0.0
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
