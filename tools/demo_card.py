"""What lies beside the demo model's weights for people to read: the model card and the licence of the text."""

import math
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_corpus import Corpus
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

CARD_QUESTIONS = (
    "Hello!",
    "What does str.split do?",
    "What does re.compile do?",
    "Who are you?",
    "What is kvstrata?",
)
LICENCE = "LICENSE-PYTHON.txt"
CARD = """\
---
license: other
license_name: apache-2.0-and-psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# strata-tiny

A Qwen3 of {parameters:,} parameters, trained from scratch on the documentation of Python, so that demos answer in
readable sentences and tests have weights that mean something. It recites; it does not reason, and what it says may be
wrong.

| | |
| --- | --- |
| architecture | Qwen3ForCausalLM, tied embeddings, {layers} layers, hidden size {hidden} |
| attention | {heads} heads of {head_dim}, {kv_heads} KV heads |
| weights | bfloat16, {megabytes:.1f} MB |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, ChatML with tools as Qwen3 has them |
| context | {context:,} tokens; trained on windows up to 4,096 |
| held-out perplexity | {perplexity:.3f} per token |
| held-out bits per byte | {bits:.3f} |

**Perplexity** is that of `heldout.txt` ({held_out_bytes:,} bytes, {held_out_tokens:,} tokens) in float32 arithmetic on
these weights: the text is cut into consecutive windows of 512 tokens; the first token of a window is only context,
every other one is scored given those before it in its window.

## Training

`python tools/train_demo_model.py --steps {steps} --out DIR`

on Python {python}, torch {torch}: {tokens:,} tokens in {steps:,} steps at {tokens_per_s:,.0f} tokens/s on one busy core
in bfloat16 autocast; Muon for the matrices, AdamW for the rest.

The text: {training_chars:,} characters of docstrings, comments and help topics of CPython's standard library and of
this project's documentation, and conversations made from {facts:,} docstrings. Whole modules and topics were held out,
chosen by the hash of their names; longer paragraphs of theirs were taken out wherever else they stood.

## Answers

Some that it knows; asked for others it makes something up, or repeats itself. Greedy:

{answers}

## Licence

Code and model are Apache-2.0, as this project is. The text that the model learnt, and that `heldout.txt` quotes, is
from Python {python}, © Python Software Foundation, under the PSF licence in [{licence}]({licence}). Changes made to it:
docstrings, comments and help topics were taken out of the sources and put one after another, as plain text.
"""


@dataclass(frozen=True, slots=True)
class Training:
    """How it went."""

    num_steps: int
    num_tokens: int
    tokens_per_s: float
    held_out_loss: float
    """Nats per token of heldout.txt."""


def write_card(
    out: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, model: Qwen3ForCausalLM, training: Training
) -> None:
    """Write README.md and Python's licence beside the weights."""
    config = model.config
    held_out = (out / "heldout.txt").read_bytes()
    held_out_tokens = len(tokenizer.backend_tokenizer.encode(held_out.decode(), add_special_tokens=False).ids)
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        megabytes=(out / "model.safetensors").stat().st_size / 1e6,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        perplexity=math.exp(training.held_out_loss),
        bits=training.held_out_loss * held_out_tokens / len(held_out) / math.log(2),
        held_out_bytes=len(held_out),
        held_out_tokens=held_out_tokens,
        steps=training.num_steps,
        tokens=training.num_tokens,
        tokens_per_s=training.tokens_per_s,
        python=platform.python_version(),
        torch=torch.__version__,
        training_chars=sum(map(len, corpus.training)),
        facts=len(corpus.facts),
        answers="\n\n".join(f"> **{q}**\n>\n> {answer(model, tokenizer, q)}" for q in CARD_QUESTIONS),
        licence=LICENCE,
    )
    (out / "README.md").write_text(card)
    (out / LICENCE).write_text(python_licence())


def answer(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's greedy answer, in one paragraph."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=128, do_sample=False)
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def python_licence() -> str:
    """The PSF licence agreement, as the running Python carries it."""
    text = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text()
    match = re.search(
        r"^PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n-+\n.*?(?=\n\n\n)", text, re.MULTILINE | re.DOTALL
    )
    if match is None:
        sys.exit("this Python carries no PSF licence: LICENSE.txt in its library has another form")
    return match.group() + "\n"
