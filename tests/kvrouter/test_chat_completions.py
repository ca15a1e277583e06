"""Conversations become the prompt that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.kvrouter.conftest import CHAT_TEMPLATE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvrouter.errors import PromptError, TokenizerLoadError
from kvrouter.preprocessing.chat_completions import ChatRequest, ChatTemplate, ModelTokenizer

TOOLS_TEMPLATE = """\
{%- set ns = namespace(last=0) -%}
{%- for tool in tools or [] %}<tool>{{ tool | tojson }}{{ tool | tojson(indent=2) }}{% endfor %}
{%- for document in documents or [] %}[{{ document.title }}: {{ document.text }}]{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{% continue %}{% endif %}
    {%- if message.role == 'error' %}{{ raise_exception('no such role') }}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
        {%- if message.tool_calls %}{{ message.tool_calls | tojson(sort_keys=true) }}{% endif %}
        {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}
{{ message.role }}: {{ message.content | trim }}
    {%- endif %}
    {%- set ns.last = loop.index %}
{%- endfor %}
{{ ns.last }}{% if enable_thinking is defined and not enable_thinking %} quick{% endif %}
{%- if add_generation_prompt %}
assistant:{% endif %}
"""
PARTS_TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<&> é", "parameters": {"b": 1, "a": [2]}}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": " be <b>brief</b> & 'kind'\n"}, {"role": "user", "content": "é 😀 \\n"}],
    [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "done", "name": None},
        {"role": "nobody", "content": "unseen"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "because"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "thinking": "hm", "reasoning_content": None},
    ],
]


def write_checkpoint(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with another tokenizer configuration."""
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    known = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(known | config))
    return target


def load_template(directory: Path) -> ChatTemplate:
    template = ChatTemplate.from_checkpoint(directory)
    assert template is not None
    return template


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TOOLS_TEMPLATE])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"tools": TOOLS, "documents": [{"title": "t", "text": "x"}]},
        {"add_generation_prompt": True, "enable_thinking": False, "eos_token": "<other>"},
        {"tools": []},
    ],
)
def test_prompt_and_ids_equal_transformers(
    checkpoint: Path, tmp_path: Path, source: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    directory = write_checkpoint(checkpoint, tmp_path, chat_template=source)
    reference = AutoTokenizer.from_pretrained(directory)
    known = {"tools", "documents", "add_generation_prompt"}
    request = ChatRequest(
        messages,
        tools=options.get("tools"),
        documents=options.get("documents"),
        add_generation_prompt=options.get("add_generation_prompt", False),
        template_kwargs={name: value for name, value in options.items() if name not in known},
    )
    assert load_template(directory).render(request) == reference.apply_chat_template(
        messages, tokenize=False, **options
    )
    ids = reference.apply_chat_template(messages, return_dict=False, **options)
    assert ModelTokenizer.load(str(directory)).encode_chat(request).tolist() == ids


def test_conversation_gets_no_second_bos(checkpoint: Path, model_tokenizer: ModelTokenizer) -> None:
    ids = model_tokenizer.encode_chat(ChatRequest([{"role": "user", "content": "hi"}])).tolist()
    assert ids.count(0) == 1
    assert model_tokenizer.encode_prompt("hi").tolist()[0] == 0
    assert 0 not in model_tokenizer.encode_prompt("hi", add_special_tokens=False).tolist()


CONTINUED = [
    (source, content)
    for source in (CHAT_TEMPLATE, TOOLS_TEMPLATE, PARTS_TEMPLATE)
    for content in ("to be continued", "with spaces  ", " x ", [{"type": "text", "text": "part "}])
    if isinstance(content, str) or source is PARTS_TEMPLATE
]


@pytest.mark.parametrize(("source", "content"), CONTINUED)
def test_continued_final_message_equals_transformers(
    checkpoint: Path, tmp_path: Path, source: str, content: str | list[dict[str, str]]
) -> None:
    directory = write_checkpoint(checkpoint, tmp_path, chat_template=source)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    request = ChatRequest(messages, add_generation_prompt=False, continue_final_message=True)
    assert load_template(directory).render(request) == expected


@pytest.mark.parametrize("where", ["jinja file", "list in the configuration", "additional directory"])
def test_named_templates_are_found_and_chosen_as_transformers_does(
    checkpoint: Path, tmp_path: Path, where: str
) -> None:
    plain, tool_use = "plain {{ messages[0].content }}", "tools {{ messages[0].content }}"
    if where == "list in the configuration":
        named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": tool_use}]
        directory = write_checkpoint(checkpoint, tmp_path, chat_template=named)
    else:
        directory = write_checkpoint(checkpoint, tmp_path, chat_template="stale")
        (directory / "chat_template.jinja").write_text(plain)
        if where == "additional directory":
            (directory / "additional_chat_templates").mkdir()
            (directory / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    reference: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    template = load_template(directory)
    messages = CONVERSATIONS[0]
    for tools in (None, TOOLS):
        expected = reference.apply_chat_template(messages, tools=tools, tokenize=False)
        assert template.render(ChatRequest(messages, tools, add_generation_prompt=False)) == expected
    if where != "jinja file":
        named_request = ChatRequest(messages, chat_template="tool_use")
        assert template.render(named_request) == "tools hi"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ChatRequest([]), "at least one message"),
        (ChatRequest([{"role": "error", "content": ""}]), "no such role"),
        (ChatRequest([{"role": "user"}]), "refuses"),
        (ChatRequest([{"role": "user", "content": "x"}], continue_final_message=True), "exclude each other"),
        (ChatRequest([{"role": "user", "content": "x"}], chat_template="{{ 1 }}"), "chat_template"),
        (ChatRequest([{"role": "user"}], add_generation_prompt=False, continue_final_message=True), "final message"),
    ],
)
def test_conversation_that_is_refused_says_why(request_: ChatRequest, words: str) -> None:
    template = ChatTemplate({"default": TOOLS_TEMPLATE.replace("| trim", "+ ''")}, {"eos_token": ""})
    with pytest.raises(PromptError, match=words):
        template.render(request_)


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for i in range(10**9) %}x{% endfor %}"],
)
def test_template_cannot_leave_the_sandbox(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(PromptError):
        template.render(ChatRequest([{"role": "user", "content": "x"}]))


def test_damaged_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    directory = write_checkpoint(checkpoint, tmp_path, chat_template="{% if %}")
    with pytest.raises(TokenizerLoadError, match="does not compile"):
        ModelTokenizer.load(str(directory))
    (directory / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerLoadError, match="no JSON object"):
        ModelTokenizer.load(str(directory))


def test_checkpoint_without_a_template_serves_prompts_only(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    tokenizer = ModelTokenizer.load(str(tmp_path))
    assert tokenizer.encode_prompt("hi").size
    with pytest.raises(PromptError, match="no chat template"):
        tokenizer.encode_chat(ChatRequest([{"role": "user", "content": "x"}]))
