"""Fixtures of the engine's tests: tiny checkpoints, and what transformers generates from them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.folovllm.checkpoints import SHAPES, make_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

MakeCheckpoint = Callable[..., Path]
Reference = Callable[[str, Sequence[int], int], list[int]]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """checkpoint(shape name, dtype=torch.float32, shards=False) -> directory; written once per session. Read only."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
        key = (name, dtype, shards)
        if key not in made:
            directory = root / f"{name}-{str(dtype).removeprefix('torch.')}{'-shards' if shards else ''}"
            made[key] = make_checkpoint(directory, SHAPES[name], dtype, shards)
        return made[key]

    return get


@pytest.fixture(scope="session")
def hf_model(checkpoint: MakeCheckpoint) -> Callable[..., PreTrainedModel]:
    """hf_model(shape name, dtype=torch.float32) -> the same checkpoint in transformers, eager attention."""
    loaded: dict[tuple[str, torch.dtype], PreTrainedModel] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        if (name, dtype) not in loaded:
            loaded[name, dtype] = AutoModelForCausalLM.from_pretrained(
                checkpoint(name, dtype), dtype=dtype, attn_implementation="eager"
            )
        return loaded[name, dtype]

    return get


@pytest.fixture(scope="session")
def reference(hf_model: Callable[..., PreTrainedModel]) -> Reference:
    """reference(shape name, prompt, n) -> the n tokens transformers generates greedily in fp32."""
    known: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def generate(name: str, prompt: Sequence[int], num_output: int) -> list[int]:
        key = (name, tuple(prompt))
        if len(known.get(key, [])) < num_output:
            ids = torch.tensor([list(prompt)])
            model = hf_model(name)
            model.generation_config.eos_token_id = None  # some architectures bring one by default
            tokens = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_output, do_sample=False, pad_token_id=0
            )
            known[key] = tokens[0, len(prompt) :].tolist()
        return known[key][:num_output]

    return generate
