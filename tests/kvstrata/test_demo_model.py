"""The model that comes with the package: whole, servable by anyone, and as good as its card says."""

import json
import math
import re
import string

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams
from kvstrata.demo_model import DEMO_MODEL, held_out_text

GPTQ_GROUP = 128
WINDOW = 512
ENGINE = {"device": "cpu", "num_kv_blocks": 128, "max_model_len": 1024, "num_threads": 1}
QUESTIONS = ("What does str.split do?", "What is kvstrata?", "Who are you?")
GREEDY = SamplingParams(temperature=0, max_tokens=160)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return Qwen3ForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


def figure(name: str) -> float:
    """A figure of the model card's table."""
    row = re.search(rf"^\| {name} \| ([\d.,]+)", (DEMO_MODEL / "README.md").read_text(), re.MULTILINE)
    assert row, f"the model card has no {name!r}"
    return float(row[1].replace(",", ""))


def test_folder_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in DEMO_MODEL.iterdir()}
    assert set(sizes) == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "LICENSE-PYTHON.txt", "heldout.txt"),
    }
    assert sizes["model.safetensors"] <= 8_000_000
    assert sum(sizes.values()) <= 8_500_000


def test_shape_can_be_quantised_in_groups_and_split_over_two_ranks(model):
    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(module.in_features % GPTQ_GROUP == 0 for module in linear)
    config = model.config
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == 0
    assert config.tie_word_embeddings


def test_any_text_survives_the_tokenizer():
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    for text in (string.printable, "naïve café ☕ 你好 🙂", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@torch.inference_mode()
def test_held_out_perplexity_is_that_of_the_model_card(model, tokenizer):
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(held_out_text(), add_special_tokens=False).ids)
    nats = count = 0
    for window in ids.split(WINDOW):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    assert math.exp(nats / count) == pytest.approx(figure("held-out perplexity"), rel=0.005)


def test_greedy_tokens_are_those_of_transformers(model, tokenizer):
    prompts = [tokenizer.encode(held_out_text()[start : start + 600]) for start in (0, 20_000, 50_000)]
    plain = GenerationConfig(max_new_tokens=32, do_sample=False, pad_token_id=0)
    with LLM(str(DEMO_MODEL), dtype="float32", **ENGINE) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_answers_are_readable_and_end():
    with LLM(str(DEMO_MODEL), **ENGINE) as llm:
        outputs = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], GREEDY)
    answers = [output.outputs[0] for output in outputs]
    assert [answer.finish_reason for answer in answers] == ["stop"] * len(QUESTIONS)
    for answer, word in zip(answers, ("split", "KV cache", "strata-tiny"), strict=True):
        assert word in answer.text
        assert answer.text.isprintable() or "\n" in answer.text
        assert not re.search(r"<\|?\w+\|?>", answer.text)


def test_a_tool_is_called(tokenizer):
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "The weather in a city.", "parameters": city}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"type": "function", "function": function}],
        add_generation_prompt=True,
        tokenize=False,
    )
    with LLM(str(DEMO_MODEL), **ENGINE) as llm:
        answer = llm.generate(prompt, GREEDY)[0].outputs[0]
    call = re.fullmatch(r"\s*<tool_call>\n(.*)\n</tool_call>", answer.text)
    assert call, answer.text
    made = json.loads(call[1])
    assert made["name"] == "get_weather"
    assert list(made["arguments"]) == ["city"]
    assert "Paris" in made["arguments"]["city"]


def test_chat_template_renders_turns_and_tools(tokenizer):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text
    one = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert text.endswith(
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
