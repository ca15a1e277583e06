import json
import string

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kvstrata.demo_model import CHAT_TEMPLATE, DemoModelShape, make_demo_model

SMALL = DemoModelShape(
    hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32, vocab_size=512
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_demo_model(tmp_path_factory.mktemp("model"), SMALL)


def test_checkpoint_has_the_files_of_a_hugging_face_checkpoint(directory):
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_any_text_survives_the_tokenizer(directory):
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (string.printable, "naïve café ☕ 你好 🙂", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_renders_turns(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_complete_checkpoint_is_left_as_it_is(directory):
    before = (directory / "model.safetensors").stat().st_mtime_ns
    make_demo_model(directory, SMALL)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
