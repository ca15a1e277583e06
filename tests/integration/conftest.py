"""A running stack of two engines and a router, shared by the tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.stack import Stack, StackSpec

ENGINE_OPTIONS = ("--num-kv-blocks", "512", "--num-threads", "1", "--max-model-len", "4096")


def stack_spec(model: Path, **changes: object) -> StackSpec:
    """Two small engines with a CPU tier behind a KV-aware router."""
    options: dict[str, object] = {"engine_options": ENGINE_OPTIONS, "cpu_cache_gb": 0.05, **changes}
    return StackSpec(model=str(model), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def stack(small_model: Path) -> Iterator[Stack]:
    """The shared stack; do not kill its processes."""
    with Stack(stack_spec(small_model)) as running:
        yield running
