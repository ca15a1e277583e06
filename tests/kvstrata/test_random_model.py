import json

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from kvstrata.demo_model import DEMO_MODEL
from kvstrata.random_model import RandomModelShape, make_random_model

SMALL = RandomModelShape(
    hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32, vocab_size=2100
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("model"), SMALL)


def test_checkpoint_has_the_files_of_a_hugging_face_checkpoint(directory):
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_tokenizer_and_chat_template_are_the_demo_models(directory):
    ours, demos = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert ours.get_vocab() == demos.get_vocab()
    assert ours.chat_template == demos.chat_template


def test_only_whole_words_can_be_said(directory):
    words = AutoTokenizer.from_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        rows = file.get_tensor("lm_head.weight").abs().sum(dim=1)
    spoken = [words.convert_ids_to_tokens(i) for i in range(2048) if rows[i]]
    assert len(spoken) > 500
    assert all(token.startswith("Ġ") and token[1:].isalpha() for token in spoken)
    assert not rows[2048:].any(), "ids without a token"


def test_weights_come_in_the_asked_dtype(tmp_path):
    shape = RandomModelShape(32, 1, 2, 1, 16, 32, dtype="bfloat16")
    with safe_open(make_random_model(tmp_path, shape) / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - no mapping
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_complete_checkpoint_is_left_as_it_is(directory):
    before = (directory / "model.safetensors").stat().st_mtime_ns
    make_random_model(directory, SMALL)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=512"):
        make_random_model(tmp_path / "model", RandomModelShape(vocab_size=512))
    assert not (tmp_path / "model").exists()
