"""Fixtures that every package's tests may use."""

from pathlib import Path

import pytest

from kvstrata.demo_model import DemoModelShape, make_demo_model

SMALL_SHAPE = DemoModelShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=128, vocab_size=2048
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 checkpoint with a real tokenizer and chat template."""
    return make_demo_model(tmp_path_factory.mktemp("small-model"), SMALL_SHAPE)
