"""The tensors of a step by their definition, for decodes, prompts and both, in rows of any order."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.backends.flash_attn import FlashAttnBackend
from folovllm.attention.backends.paged import PagedBackend
from folovllm.core.sched.output import SchedulerOutput
from folovllm.sampling_params import SamplingParams
from folovllm.worker.input_batch import CachedRequestState, InputBatch
from folovllm.worker.step_inputs import InputPreparer, StepInputs

BLOCK, MAX_LEN, MAX_REQS = 4, 40, 8


@dataclass
class Known:
    """What the preparer should know of a request."""

    tokens: list[int]
    blocks: list[int]
    computed: int = 0


@dataclass
class Rows:
    """A batch and its requests."""

    backend: AttentionBackend
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    known: dict[str, Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = InputBatch(MAX_REQS, MAX_LEN, BLOCK)
        self.preparer = InputPreparer(self.batch, self.backend, MAX_REQS * MAX_LEN, torch.device("cpu"))

    def add(self, name: str, num_tokens: int) -> None:
        tokens = self.dice.choices(range(1000), k=num_tokens)
        blocks = self.dice.sample(range(1, 500), MAX_LEN // BLOCK)
        state = CachedRequestState(name, num_tokens, SamplingParams(), 0, np.empty(0, np.int64))
        self.batch.add(state, tokens, blocks, 0)
        self.known[name] = Known(tokens, blocks)

    def remove(self, name: str) -> None:
        self.batch.remove(name)
        del self.known[name]

    def step(self, scheduled: dict[str, int]) -> StepInputs:
        """Prepare, check, and append a token to those that sample."""
        inputs = self.preparer.prepare(SchedulerOutput([], [], scheduled, sum(scheduled.values()), set(), set()))
        samples = check(inputs, scheduled, self.known)
        for name in samples:
            self.known[name].tokens.append(self.dice.randrange(1000))
        rows = inputs.rows[inputs.samples]
        self.batch.append_tokens(rows, np.array([self.known[name].tokens[-1] for name in samples], dtype=np.int64))
        return inputs


def check(inputs: StepInputs, scheduled: dict[str, int], known: dict[str, Known]) -> list[str]:
    """Compare with the definition; returns who samples."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ends, samples, last_rows = [], [], []
    for name, count in scheduled.items():
        request = known[name]
        for position in range(request.computed, request.computed + count):
            ids.append(request.tokens[position])
            positions.append(position)
            slots.append(request.blocks[position // BLOCK] * BLOCK + position % BLOCK)
        request.computed += count
        ends.append(len(ids))
        if request.computed == len(request.tokens):
            samples.append(name)
            last_rows.append(len(ids) - 1)
    metadata = inputs.attn_metadata
    seq_lens = [known[name].computed for name in scheduled]
    assert inputs.input_ids.tolist() == ids
    assert inputs.positions.tolist() == positions
    assert metadata.slot_mapping.tolist() == slots
    assert metadata.slot_blocks.tolist() == [slot // BLOCK for slot in slots]
    assert metadata.slot_offsets.tolist() == [slot % BLOCK for slot in slots]
    assert metadata.query_start_loc.tolist() == metadata.query_start_loc_cpu.tolist() == [0, *ends]
    assert metadata.seq_lens.tolist() == metadata.seq_lens_cpu.tolist() == seq_lens
    assert metadata.block_tables.shape[1] == -(-max(seq_lens) // BLOCK)
    for row, name in zip(metadata.block_tables.tolist(), scheduled, strict=True):
        used = -(-known[name].computed // BLOCK)
        assert row[:used] == known[name].blocks[:used]
    assert [list(scheduled)[i] for i in inputs.samples] == samples
    indices = range(len(ids)) if inputs.logits_indices is None else inputs.logits_indices.tolist()
    assert list(indices) == last_rows
    return samples


@pytest.mark.parametrize("backend", [PagedBackend, FlashAttnBackend])
def test_steps_of_every_kind_follow_the_definition(backend):
    rows = Rows(backend(4, 2, 32, BLOCK))
    for number in range(300):
        known, dice = rows.known, rows.dice
        for name in [name for name, request in known.items() if len(request.tokens) == MAX_LEN]:
            rows.remove(name)
        if known and dice.random() < 0.05:
            rows.remove(dice.choice(list(known)))
        if len(known) < MAX_REQS and dice.random() < 0.2:
            rows.add(f"r{number}", dice.randint(1, 12))
        chosen = [name for name in known if dice.random() < 0.95]
        if dice.random() < 0.1:
            dice.shuffle(chosen)
        most = dice.choice([1, 1, 5])
        scheduled = {name: min(most, len(known[name].tokens) - known[name].computed) for name in chosen}
        if scheduled:
            rows.step(scheduled)


def test_tensors_of_decodes_are_reused_until_the_batch_changes():
    rows = Rows(PagedBackend(4, 2, 32, BLOCK))
    for name in "ab":
        rows.add(name, 1)
    first = rows.step({"a": 1, "b": 1})
    assert rows.step({"a": 1, "b": 1}) is first
    rows.step({"b": 1, "a": 1})
    rows.remove("a")
    rows.add("c", 3)
    mixed = rows.step({"b": 1, "c": 3})
    decodes = rows.step({"b": 1, "c": 1})
    assert decodes is not first
    assert decodes is not mixed
    assert rows.step({"b": 1, "c": 1}).attn_metadata.block_tables.shape == (2, 2)
