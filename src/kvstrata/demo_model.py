"""A small Qwen3 checkpoint with its own tokenizer, made on the spot: the demo and the tests need no network.

The weights are random, so the model says nothing sensible; everything else about it is real: the files are what
`transformers` would save, and any engine that serves Qwen3 can serve it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class DemoModelShape:
    """Size of the demo model: about 12 million parameters, 50 MB in float32."""

    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1152
    vocab_size: int = 4096
    max_position_embeddings: int = 8192
    seed: int = 7


def corpus() -> list[str]:
    """English text that every Python installation carries: the topics of its help system."""
    return [topics.topics[name] for name in sorted(topics.topics)]


def make_demo_model(directory: Path, shape: DemoModelShape | None = None) -> Path:
    """Write a checkpoint (config.json, model.safetensors, tokenizer.json, chat template) into `directory`.

    Writing takes seconds; a directory that already holds the same shape is left as it is.

    Returns:
        `directory`.
    """
    shape = shape or DemoModelShape()
    done = directory / "demo_shape.json"
    stamp = json.dumps({name: getattr(shape, name) for name in shape.__slots__})
    if done.is_file() and done.read_text() == stamp:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(shape.vocab_size)
    _write_tokenizer(directory, tokenizer)
    _write_weights(directory, shape, tokenizer)
    done.write_text(stamp)
    return directory


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _write_weights(directory: Path, shape: DemoModelShape, tokenizer: Tokenizer) -> None:
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
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.token_to_id(END_OF_TURN),
        dtype="float32",
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # A logit of exactly 0 is never the largest of thousands: the model babbles in whole words, not in broken bytes,
        # and a turn ends by its length, so that every run does the same work.
        for token, token_id in tokenizer.get_vocab().items():
            if not (token.startswith("Ġ") and token[1:].isalpha() and token.isprintable()):
                model.lm_head.weight[token_id].zero_()
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
