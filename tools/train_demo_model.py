"""Train a small Qwen3 from scratch on documentation that any machine has, and write its checkpoint.

`python tools/train_demo_model.py --out DIR` takes about 40 minutes of one core and needs no network. Seeds are fixed:
the same steps, on the same version of Python and of this repository, learn from the same tokens in the same order. An
interrupted run goes on from its last checkpoint in --work.

```
corpus ──> byte-level BPE ──> documents in chunks ─┐ shuffled and packed into windows:
              └──────────────> conversations ──────┴─> 512 tokens, in the last quarter 2,048 and then 4,096
```
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_card import Training, write_card
from demo_corpus import ROOT, Corpus, load_corpus
from demo_dialogues import dialogues
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VOCAB_SIZE = 2048
END_OF_TEXT, END_OF_TURN = 0, 2
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
WINDOW = 512
LAST_WINDOWS = (2048, 4096)
"""Tokens of a window in most of the training, and in the two halves of its last quarter."""
LAST_SHARE = 0.25
TOKENS_PER_STEP = 2048
"""At least: a step takes whole windows."""
CHARS_PER_TOKEN = 2.8
EVALUATION_WINDOW = 512
STEPS_UNIT = 8
"""Steps come in multiples of it, so that the parts are whole."""
LONG_WINDOW_COST = 2.0
"""Time of a step of long windows over that of others: they hold more tokens, and more to attend to."""
WARM_UP_STEPS = 40
MATRIX_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 3e-3
REPORT_EVERY = 50
SEED = 1


@dataclass(slots=True)
class Schedule:
    """How long to train: until a number of steps, or until the time is up.

    The learning rate warms up and stays, so that the last quarter of a run, in which it falls to 0, can begin at any
    time: when `steps` says, or when just the time for it is left.
    """

    steps: int | None
    deadline: float
    """On the clock of time.perf_counter; only looked at while `steps` is None."""

    @property
    def turn(self) -> int | None:
        """The step that begins the last part; None while nobody knows."""
        return None if self.steps is None else round(self.steps * (1 - LAST_SHARE))

    def looks_at_the_clock(self, step: int, seconds_per_step: float) -> None:
        """After `step` steps: begin the last part, if there is just the time for it."""
        if self.steps is None and step % (STEPS_UNIT - 2) == 0:
            steps = round(step / (1 - LAST_SHARE))
            if time.perf_counter() + (steps - step) * seconds_per_step * LONG_WINDOW_COST >= self.deadline:
                self.steps = steps

    def rate_at(self, step: int) -> float:
        """Share of the highest learning rate."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm if self.steps is None else min(warm, (self.steps - step) / (self.steps * LAST_SHARE))


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Byte-level BPE with the special tokens of ChatML first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TOOL_TOKENS),
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.chain(corpus.training, (f"{f.name}{f.signature}: {f.text}" for f in corpus.facts))
    tokenizer.train_from_iterator(texts, trainer)
    # They are shown to whoever parses the answer, so they are not "special".
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOOL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[END_OF_TURN],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
        "model_max_length": SHAPE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": (ROOT / "tools" / "demo_chat_template.jinja").read_text(),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text of any length."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


class Batches:
    """Batches of the schedule's parts; equal seeds give equal batches."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._documents = [token_ids(tokenizer, text) for text in corpus.training]

    def follow(self, schedule: Schedule, step: int) -> Iterator[torch.Tensor]:
        """int64 [batch, window] for each step from `step` on, which may come before the schedule knows its end."""
        for batch in itertools.islice(self._batches(WINDOW), step, None):
            if schedule.turn is not None and step >= schedule.turn:
                break
            yield batch
            step += 1
        assert schedule.steps is not None
        assert schedule.turn is not None
        length = (schedule.steps - schedule.turn) // len(LAST_WINDOWS)
        for number, window in enumerate(LAST_WINDOWS):
            done = min(length, max(0, step - schedule.turn - number * length))
            yield from itertools.islice(self._batches(window), done, length)

    def _batches(self, window: int) -> Iterator[torch.Tensor]:
        windows = self._windows(window, random.Random(SEED * window))
        while True:
            yield torch.tensor(list(itertools.islice(windows, max(1, TOKENS_PER_STEP // window))))

    def _windows(self, window: int, rng: random.Random) -> Iterator[list[int]]:
        """Whole conversations and chunks of documents, each ended, packed one after another; the last is cut off."""
        while True:
            units = [*self._chunks(window, rng), *self._conversations(window, rng)]
            rng.shuffle(units)
            packed: list[int] = []
            for unit in units:
                packed += [*unit, END_OF_TEXT]
                if len(packed) >= window:
                    yield packed[:window]
                    packed = []

    def _chunks(self, window: int, rng: random.Random) -> Iterator[list[int]]:
        for document in self._documents:
            first = rng.randrange(window // 4, window)
            for start in (0, *range(first, len(document), window - 1)):
                yield document[start : first if start == 0 else start + window - 1]

    def _conversations(self, window: int, rng: random.Random) -> Iterator[list[int]]:
        for dialogue in dialogues(self._corpus, rng, round(window * CHARS_PER_TOKEN)):
            text = self._tokenizer.apply_chat_template(dialogue.messages, tools=dialogue.tools, tokenize=False)
            yield token_ids(self._tokenizer, text)


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, window: int = EVALUATION_WINDOW) -> float:
    """Mean nats per token over consecutive windows of a text; the first token of a window is only context."""
    total = 0.0
    count = 0
    for piece in ids.split(window):
        if len(piece) > 1:
            logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1].float()
            total += cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    return total / count


class Trainer:
    """A model, its optimizers, and the step they stand at. Matrices learn by Muon, the embedding and norms by AdamW."""

    def __init__(self, schedule: Schedule, checkpoint: Path) -> None:
        torch.manual_seed(SEED)
        self.schedule = schedule
        self.step = 0
        self.num_tokens = 0
        self._checkpoint = checkpoint
        config = Qwen3Config(**SHAPE, bos_token_id=None, eos_token_id=END_OF_TURN, pad_token_id=END_OF_TEXT)
        self.model = Qwen3ForCausalLM(config)
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.dim() != 2 or "embed" in name]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.02),
            torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        self._resume()

    def train(self, batch: torch.Tensor) -> float:
        """One step; the mean nats per token."""
        rate = self.schedule.rate_at(self.step)
        for optimizer, highest in zip(self._optimizers, (MATRIX_LEARNING_RATE, OTHER_LEARNING_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * highest
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.num_tokens += batch.numel()
        return loss.item()

    def save(self) -> None:
        """Write everything that the next step needs; the file before stays until the new one is whole."""
        state = {
            "steps": self.schedule.steps,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._checkpoint)

    def _resume(self) -> None:
        """Go on from the checkpoint, unless it is already beyond where this schedule turns."""
        if not self._checkpoint.is_file():
            return
        state = torch.load(self._checkpoint, weights_only=True)
        turn = self.schedule.turn
        if state["steps"] and self.schedule.steps is None:
            self.schedule.steps = state["steps"]
        elif state["steps"] != self.schedule.steps and (state["steps"] or turn is None or state["step"] > turn):
            return
        self.step = state["step"]
        self.num_tokens = state["num_tokens"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train(trainer: Trainer, batches: Batches, held_out: torch.Tensor, console: Console) -> float:
    """All steps that are left, with a bar; the tokens per second they took."""
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    schedule, first_step, first_token = trainer.schedule, trainer.step, trainer.num_tokens
    start = time.perf_counter()
    loss = 0.0
    speed = 0.0
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task("", total=schedule.steps, completed=trainer.step, note="")
        for batch in batches.follow(schedule, trainer.step):
            now = trainer.train(batch)
            loss = 0.95 * loss + 0.05 * now if loss else now
            seconds = time.perf_counter() - start
            schedule.looks_at_the_clock(trainer.step, seconds / (trainer.step - first_step))
            speed = (trainer.num_tokens - first_token) / seconds
            note = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
            progress.update(task, completed=trainer.step, total=schedule.steps, note=note)
            if trainer.step % REPORT_EVERY == 0 or trainer.step == schedule.steps:
                trainer.save()
                perplexity = math.exp(held_out_loss(trainer.model, held_out))
                console.print(f"step {trainer.step}: {note}, held-out perplexity {perplexity:.2f}", highlight=False)
    return speed


def export(model: Qwen3ForCausalLM, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors, in bfloat16."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[END_OF_TURN, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=True, temperature=0.3, top_p=0.9
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """Parse the options, train, export, and write the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the finished checkpoint")
    parser.add_argument("--minutes", type=float, default=40, help="take about so long")
    parser.add_argument("--steps", type=int, help="the exact number of steps instead, as the model card names it")
    parser.add_argument("--threads", type=int, default=1, help="threads of the arithmetic")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-model", help="directory of the checkpoints")
    options = parser.parse_args()
    if options.steps and options.steps % STEPS_UNIT:
        parser.error(f"--steps must be a multiple of {STEPS_UNIT}, not {options.steps}")
    console = Console()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus()
    write_tokenizer(train_tokenizer(corpus), options.out)
    held_out_text = "\n\n".join(corpus.held_out) + "\n"
    (options.out / "heldout.txt").write_text(held_out_text)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    held_out = torch.tensor(token_ids(tokenizer, held_out_text))
    schedule = Schedule(options.steps, time.perf_counter() + 60 * options.minutes)
    trainer = Trainer(schedule, options.work / "checkpoint.pt")
    console.print(f"{trainer.model.num_parameters():,} parameters, from step {trainer.step} of {schedule.steps or '?'}")
    speed = train(trainer, Batches(corpus, tokenizer), held_out, console)
    export(trainer.model, options.out)
    model = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    loss = held_out_loss(model, held_out)
    training = Training(trainer.step, trainer.num_tokens, speed, loss)
    write_card(options.out, corpus, tokenizer, model, training)
    console.print(f"{options.out}: held-out perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()
