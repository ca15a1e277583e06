"""A tiny model that has a byte-level tokenizer, and an engine on it."""

from pathlib import Path
from typing import Any

from tests.folovllm.checkpoints import Q3, Shape, make_checkpoint
from tests.folovllm.serving_fixtures import make_backend, write_tokenizer

from folovllm.entrypoints.llm import LLM
from folovllm.outputs import RequestOutput

# More rows than the tokenizer has tokens, as real checkpoints have.
TEXT_SHAPE = Shape("text", Q3, 32, 4, 2, 1, 420, tied=False, head_dim=8)
EOS_ID = 2


def make_text_model(directory: Path) -> Path:
    """The checkpoint; the same bytes every time."""
    make_checkpoint(directory, TEXT_SHAPE)
    write_tokenizer(directory)
    return directory


def make_llm(model: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "num_kv_blocks": 400, "num_threads": 1}
    return LLM(str(model), **{**defaults, **options})


def token_of(text: str) -> int:
    """The id of a text that is one token."""
    (token_id,) = make_backend().encode(text).ids
    return token_id


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """By prompt and sequence."""
    return [[sequence.token_ids for sequence in output.outputs] for output in outputs]
