"""Stand-ins for the model runner and the KV connector that know what every slot of the cache must hold.

A slot's content is the hash of all tokens up to and including its own: what a transformer's K and V depend on. So a
request that reads a block computed for another prefix, not computed yet, loaded wrongly or handed to somebody else is
caught at the slot where it happens.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from folovllm.config import CacheConfig, SchedulerConfig, SchedulingPolicy
from folovllm.core.kv_cache_utils import get_request_block_hasher
from folovllm.core.sched.output import KVConnectorOutput, ModelRunnerOutput, SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.engine.messages import EngineCoreRequest
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from kvblocks.hashing import BlockHasher

BLOCK_SIZE = 4
GARBAGE = b"garbage"
WRONG_TOKEN = 777


def contents(tokens: Sequence[int]) -> list[bytes]:
    """What the slots of these tokens must hold."""
    state, result = hashlib.sha256(), []
    for token in tokens:
        state.update(token.to_bytes(4, "big"))
        result.append(state.digest()[:8])
    return result


def next_token(tokens: Sequence[int]) -> int:
    """The model: a function of all tokens before."""
    return int.from_bytes(hashlib.sha256(repr(list(tokens)).encode()).digest()[:2], "big") % 50


def make_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 8,
    eos: tuple[int, ...] = (),
    salt: str | None = None,
    block_size: int = BLOCK_SIZE,
    priority: int = 0,
    arrival_time: float = 0.0,
    **params: Any,
) -> Request:
    message = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(temperature=0.0, max_tokens=max_tokens, **params),
        eos_token_ids=eos,
        cache_salt=salt,
        priority=priority,
        arrival_time=arrival_time,
    )
    return Request(message, get_request_block_hasher(BlockHasher(block_size=block_size)))


def make_scheduler(
    num_blocks: int = 33,
    *,
    block_size: int = BLOCK_SIZE,
    max_num_seqs: int = 16,
    budget: int = 64,
    chunked: bool = True,
    caching: bool = True,
    max_model_len: int = 128,
    policy: SchedulingPolicy = "fcfs",
    threshold: int = 0,
    **options: Any,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs, budget, chunked, policy, threshold),
        CacheConfig(block_size, num_blocks, caching),
        max_model_len,
        **options,
    )


@dataclass
class Row:
    tokens: list[int]
    block_ids: list[int]
    num_computed: int


class FakeRunner:
    """Holds rows and slots as the model runner does, and checks every slot that a row attends to."""

    def __init__(self, block_size: int = BLOCK_SIZE, connector: "FakeConnector | None" = None) -> None:
        self.block_size = block_size
        self.slots: dict[int, bytes] = {}
        self.rows: dict[str, Row] = {}
        self.connector = connector
        self._spans: dict[str, tuple[int, int]] = {}
        """Request id -> the positions that the step computes."""
        self.num_computed = 0
        """Tokens, over all steps."""

    def execute_model(self, output: SchedulerOutput, *, may_be_wrong: bool = False) -> ModelRunnerOutput:
        """Run a step. `may_be_wrong`: it was scheduled before the scheduler heard of a load that failed."""
        self._update_rows(output)
        self.num_computed += output.total_num_scheduled_tokens
        report = self.connector.run_step(self, output) if self.connector is not None else None
        invalid = report.invalid_block_ids if report is not None else set()
        # As in a layer of the model: all slots of the step are written, then the rows attend.
        for request_id, (start, end) in self._spans.items():
            row = self.rows[request_id]
            assert end <= len(row.tokens) or may_be_wrong, f"{request_id}: a token that nobody knows"
            written = contents(row.tokens[:end])[start:]
            for position, content in enumerate(written, start):
                self.slots[self._slot(row, position)] = content
        sampled = {}
        for request_id, (start, end) in self._spans.items():
            row = self.rows[request_id]
            wrong = self._first_wrong_position(row, end)
            # Behind a load that failed in this very step anything may stand: the scheduler has yet to be told.
            is_excused = invalid or may_be_wrong
            assert wrong is None or is_excused, f"{request_id}: wrong KV at position {wrong} of {start}..{end}"
            if end == len(row.tokens):
                row.tokens.append(next_token(row.tokens) if wrong is None else WRONG_TOKEN)
                sampled[request_id] = [row.tokens[-1]]
        return ModelRunnerOutput(sampled, report)

    def shutdown(self) -> None:
        self.rows.clear()

    def _update_rows(self, output: SchedulerOutput) -> None:
        for request_id in output.finished_req_ids | output.preempted_req_ids:
            self.rows.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.rows, "announced as new twice"
            self.rows[new.req_id] = Row(list(new.prompt_token_ids), list(new.block_ids), new.num_computed_tokens)
        for cached in output.scheduled_cached_reqs:
            if cached.resumed_from_preemption:
                assert cached.req_id not in self.rows, "resumed without having been preempted"
                tokens, block_ids = list(cached.all_token_ids or ()), list(cached.block_ids)
                self.rows[cached.req_id] = Row(tokens, block_ids, cached.num_computed_tokens)
            else:
                assert cached.block_ids, "no news"
                row = self.rows[cached.req_id]
                row.block_ids += cached.block_ids
                assert row.num_computed == cached.num_computed_tokens, "it goes on where it was"
        self._spans = {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            row = self.rows[request_id]
            self._spans[request_id] = row.num_computed, row.num_computed + num_tokens
            row.num_computed += num_tokens

    def _slot(self, row: Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _first_wrong_position(self, row: Row, end: int) -> int | None:
        assert 0 not in row.block_ids, "the null block was handed out"
        assert len(row.block_ids) >= -(-end // self.block_size), "a token without a slot"
        for position, content in enumerate(contents(row.tokens[:end])):
            if self.slots.get(self._slot(row, position)) != content:
                return position
        return None


@dataclass
class Load:
    request: Request
    positions: range
    block_ids: list[int]
    outcome: str
    is_async: bool
    steps_left: int


@dataclass
class StepTransfers:
    loads: list[Load] = field(default_factory=list)
    sends: dict[str, int] = field(default_factory=dict)


@dataclass
class FakeConnector:
    """Claims to hold `hits[request_id]` tokens of a prompt; both halves in one object.

    What the scheduler half decides reaches the worker half in the step's metadata, as it must.
    outcome: "ok", or "fail:<k>": the k-th block of the load is not written and reported.
    """

    block_size: int = BLOCK_SIZE
    hits: dict[str, tuple[int, bool, int, str]] = field(default_factory=dict)
    """request id -> (tokens of the prompt held, async, steps an async load takes, outcome)"""
    undecided: dict[str, int] = field(default_factory=dict)
    """request id -> how often to answer "not known yet" """
    put_off: set[str] = field(default_factory=set)
    """requests that got this answer in the last step"""
    sends: dict[str, int] = field(default_factory=dict)
    """request id -> steps that saving its blocks takes after it ended"""
    asked: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    sending: dict[str, int] = field(default_factory=dict)
    sending_blocks: dict[str, list[int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    _matched: dict[str, int] = field(default_factory=dict)
    _put_off_now: set[str] = field(default_factory=set)
    _saved: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    _step: StepTransfers = field(default_factory=StepTransfers)
    _unlaunched: list[StepTransfers] = field(default_factory=list)

    # -- scheduler half
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.asked.append(request.request_id)
        if self.undecided.get(request.request_id, 0) > 0:
            self.undecided[request.request_id] -= 1
            self._put_off_now.add(request.request_id)
            return None, False
        num_held, is_async, _, _ = self.hits.get(request.request_id, (0, False, 0, "ok"))
        self._matched[request.request_id] = num_computed_tokens
        return max(0, num_held - num_computed_tokens), is_async

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        _, is_async, num_steps, outcome = self.hits[request.request_id]
        start = self._matched[request.request_id]
        positions = range(start, start + num_external_tokens)
        (block_ids,) = blocks.get_block_ids()
        self._step.loads.append(Load(request, positions, list(block_ids), outcome, is_async, num_steps))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepTransfers:
        step, self._step = self._step, StepTransfers()
        self._unlaunched.append(step)
        self.put_off, self._put_off_now = self._put_off_now, set()
        return step

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        pass

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        assert request.is_finished
        self.finished.append(request.request_id)
        num_steps = self.sends.get(request.request_id, 0)
        if not num_steps or not block_ids:
            return False, None
        self._step.sends[request.request_id] = num_steps
        self.sending_blocks[request.request_id] = list(block_ids)
        # What a store keeps under the hashes of these tokens, and the slots that must hold it.
        num_saved = min(request.num_computed_tokens, request.num_tokens) // self.block_size * self.block_size
        slots = [b * self.block_size + i for b in block_ids for i in range(self.block_size)]
        if request in [load.request for load in self._all_loads()]:
            num_saved = 0  # it ended while it was being loaded
        self._saved[request.request_id] = list(zip(slots, contents(request.all_token_ids[:num_saved]), strict=False))
        return True, None

    def take_events(self) -> Iterable[Any]:
        return ()

    def reset_cache(self) -> bool | None:
        self.hits.clear()
        return True

    def shutdown(self) -> None:
        pass

    # -- worker half
    def run_step(self, runner: FakeRunner, output: SchedulerOutput) -> KVConnectorOutput:
        report = KVConnectorOutput()
        step = self._unlaunched.pop(0)
        assert step is output.kv_connector_metadata
        self.loads += step.loads
        self.sending |= step.sends
        for load in list(self.loads):
            load.steps_left -= 1
            if load.is_async and load.steps_left > 0:
                self._write(runner, load, only_first=True)
                continue
            self.loads.remove(load)
            report.invalid_block_ids |= self._write(runner, load)
            if load.is_async:
                report.finished_recving.add(load.request.request_id)
        for request_id in list(self.sending):
            self.sending[request_id] -= 1
            for slot, content in self._saved[request_id]:
                assert runner.slots.get(slot) == content, f"{request_id}: wrong KV was saved"
            if self.sending[request_id] <= 0:
                del self.sending[request_id], self.sending_blocks[request_id]
                report.finished_sending.add(request_id)
        return report

    def busy_blocks(self) -> set[int]:
        """Blocks that a transfer reads or writes."""
        written = {
            load.block_ids[position // self.block_size]
            for load in self._all_loads()
            for position in load.positions
            if load.is_async
        }
        return written.union(*self.sending_blocks.values())

    def _all_loads(self) -> list[Load]:
        return [*self.loads, *(load for step in [*self._unlaunched, self._step] for load in step.loads)]

    def _write(self, runner: FakeRunner, load: Load, *, only_first: bool = False) -> set[int]:
        first, last = load.positions.start // self.block_size, (load.positions.stop - 1) // self.block_size
        bad = None
        if load.outcome.startswith("fail"):
            bad = min(first + int(load.outcome.partition(":")[2]), last)
        expected = contents(list(load.request.all_token_ids))
        for position in load.positions[:1] if only_first else load.positions:
            index = position // self.block_size
            slot = load.block_ids[index] * self.block_size + position % self.block_size
            runner.slots[slot] = GARBAGE if index == bad else expected[position]
        return set() if bad is None or only_first else {load.block_ids[bad]}


def expected_tokens(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake model generates greedily."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]
