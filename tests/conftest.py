"""Fixtures that every package's tests may use."""

from pathlib import Path

import pytest

from kvstrata.random_model import RandomModelShape, make_random_model

SMALL_SHAPE = RandomModelShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=128, vocab_size=2048
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 checkpoint with random float32 weights, a real tokenizer and a chat template."""
    return make_random_model(tmp_path_factory.mktemp("small-model"), SMALL_SHAPE)
