"""The scheduler under random workloads: whatever comes, nothing leaks, nothing is computed from wrong KV, all ends.

What holds after each step (budget, seats, order, blocks) is checked by `scheduler_driver`; what each slot of the cache
must contain by the fake runner. HYPOTHESIS_EXAMPLES multiplies the number of examples.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, note, settings
from tests.folovllm.core_fakes import FakeConnector, FakeRunner, expected_tokens, make_request, make_scheduler
from tests.folovllm.scheduler_driver import Pipeline

from folovllm.config import SchedulingPolicy
from folovllm.core.sched.scheduler import Scheduler
from folovllm.request import Request, RequestStatus
from kvblocks.events import BlockRemoved, BlockStored, KVEvent
from kvblocks.hashing import external_hash

MAX_STEPS = 600
DEPTHS = [1, 2, 3]
"""Steps in flight: one with synchronous scheduling, two with asynchronous; the scheduler itself takes any number."""
SCALE = int(os.environ.get("HYPOTHESIS_EXAMPLES", "1"))


@dataclass(frozen=True)
class Arrival:
    """One request of the workload."""

    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    abort_step: int | None
    abort_in_flight: bool
    """Aborted after a step was launched, not before."""
    hit: tuple[int, bool, int, str] | None
    undecided: int
    send_steps: int
    salt: str | None
    priority: int
    eos: tuple[int, ...]


@dataclass(frozen=True)
class Setup:
    """One engine."""

    num_blocks: int
    budget: int
    max_num_seqs: int
    chunked: bool
    caching: bool
    policy: SchedulingPolicy
    threshold: int
    failure_policy: str


# Few tokens and few beginnings, so that prompts share prefixes of all lengths.
prompts = st.builds(
    lambda head, tail: (*head, *tail),
    st.sampled_from([tuple(range(20)), tuple(range(8)), (1, 1, 1, 1, 1), ()]),
    st.lists(st.integers(0, 2), min_size=1, max_size=10),
).map(tuple)
outcomes = st.sampled_from(["ok", "ok", "fail:0", "fail:1", "fail:3"])
hits = st.none() | st.tuples(st.integers(1, 40), st.booleans(), st.integers(1, 4), outcomes)
steps = st.integers(0, 25)


def arrivals(*, with_connector: bool) -> st.SearchStrategy[Arrival]:
    return st.builds(
        Arrival,
        step=steps,
        prompt=prompts,
        max_tokens=st.integers(1, 20),
        abort_step=st.none() | steps,
        abort_in_flight=st.booleans(),
        hit=hits if with_connector else st.none(),
        undecided=st.integers(0, 3) if with_connector else st.just(0),
        send_steps=st.integers(0, 4) if with_connector else st.just(0),
        salt=st.sampled_from([None, None, "tenant"]),
        priority=st.integers(-1, 2),
        eos=st.sampled_from([(), (), tuple(range(5)), tuple(range(0, 50, 3))]),
    )


def workloads(*, with_connector: bool) -> st.SearchStrategy[list[Arrival]]:
    return st.lists(arrivals(with_connector=with_connector), min_size=1, max_size=12)


setups = st.builds(
    Setup,
    num_blocks=st.integers(2, 24),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    chunked=st.booleans(),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    threshold=st.sampled_from([0, 0, 1, 3, 7]),
    failure_policy=st.sampled_from(["recompute", "recompute", "fail"]),
)


def build(setup: Setup, connector: FakeConnector | None) -> Scheduler:
    max_model_len = 64
    budget = setup.budget if setup.chunked else max(setup.budget, max_model_len)
    return make_scheduler(
        setup.num_blocks,
        budget=budget,
        max_num_seqs=min(setup.max_num_seqs, budget),
        chunked=setup.chunked,
        caching=setup.caching,
        max_model_len=max_model_len,
        policy=setup.policy,
        threshold=setup.threshold if setup.chunked else 0,
        connector=connector,
        kv_load_failure_policy=setup.failure_policy,
        enable_kv_cache_events=True,
    )


class Listener:
    """What somebody who only reads the events believes."""

    def __init__(self) -> None:
        self.known: Counter[int] = Counter()

    def take(self, events: list[KVEvent]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                parent = event.parent_block_hash
                assert parent is None or self.known[parent] > 0, "stored behind a parent that nobody announced"
                assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                self.known.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.known.subtract(event.block_hashes)

    def check(self, scheduler: Scheduler) -> None:
        blocks = scheduler.kv_cache_manager.block_pool.blocks
        assert +self.known == Counter(external_hash(b.block_hash) for b in blocks if b.block_hash is not None)


def make(name: str, arrival: Arrival, policy: SchedulingPolicy) -> Request:
    return make_request(
        name,
        arrival.prompt,
        max_tokens=arrival.max_tokens,
        salt=arrival.salt,
        eos=arrival.eos,
        priority=arrival.priority if policy == "priority" else 0,
        arrival_time=float(arrival.step),
    )


def run(setup: Setup, workload: list[Arrival], depth: int) -> None:
    names = {f"r{i}": arrival for i, arrival in enumerate(sorted(workload, key=lambda a: a.step))}
    connector = None
    if any(a.hit or a.undecided or a.send_steps for a in workload):
        connector = FakeConnector(
            hits={name: a.hit for name, a in names.items() if a.hit},
            undecided={name: a.undecided for name, a in names.items()},
            sends={name: a.send_steps for name, a in names.items()},
        )
    scheduler, listener = build(setup, connector), Listener()
    pipeline = Pipeline(scheduler, FakeRunner(connector=connector), depth)
    tokens: dict[str, list[int]] = {name: [] for name in names}
    reasons: dict[str, str] = {}

    def abort(step: int, *, in_flight: bool) -> None:
        for name, arrival in names.items():
            if (arrival.abort_step, arrival.abort_in_flight) == (step, in_flight) and name in scheduler.requests:
                scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
                reasons[name] = "abort"

    for step in range(MAX_STEPS):
        for name, arrival in names.items():
            if arrival.step == step:
                scheduler.add_request(make(name, arrival, setup.policy))
        abort(step, in_flight=False)
        pipeline.launch()
        abort(step, in_flight=True)
        if connector is None and setup.policy == "fcfs":
            order = [int(request.request_id[1:]) for request in scheduler.running]
            assert order == sorted(order), "first come, first served"
        for emitted in pipeline.complete():
            assert emitted.request_id not in reasons, "output after the end"
            tokens[emitted.request_id] += emitted.new_token_ids
            assert 0 <= emitted.num_external_cached_tokens <= emitted.num_cached_tokens
            if emitted.finish_reason:
                reasons[emitted.request_id] = emitted.finish_reason
        listener.take(scheduler.kv_cache_manager.take_events())
        listener.check(scheduler)
        if step > 25 and not pipeline.has_work:
            break
    else:
        raise AssertionError(f"livelock: {reasons}, left {list(scheduler.requests)}")
    note(str(reasons))
    check_ends(scheduler, setup, names, tokens, reasons)


def check_ends(
    scheduler: Scheduler, setup: Setup, names: dict[str, Arrival], tokens: dict[str, list[int]], reasons: dict[str, str]
) -> None:
    assert reasons.keys() == names.keys(), "a request never ended"
    assert scheduler.kv_cache_manager.usage == 0
    assert scheduler.kv_cache_manager.reset_prefix_cache()
    for name, arrival in names.items():
        expected = expected_tokens(arrival.prompt, len(tokens[name]))
        assert tokens[name] == expected, "tokens depend on who shared the batch"
        num_before_end = len(tokens[name]) - (reasons[name] == "stop")
        assert not set(arrival.eos) & set(tokens[name][:num_before_end]), "it went on after its end"
        if reasons[name] == "stop":
            assert tokens[name][-1] in arrival.eos
        if reasons[name] == "length":
            assert len(tokens[name]) == min(arrival.max_tokens, 64 - len(arrival.prompt))
        if reasons[name] == "error":
            needed = len(arrival.prompt) + arrival.max_tokens - 1
            may_fail = setup.failure_policy == "fail"  # its load, or that of a request whose blocks it shares
            assert needed > scheduler.capacity_tokens or may_fail, "an error for a request that fits"


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logging.getLogger("folovllm.core.sched").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("folovllm.core.sched").setLevel(logging.NOTSET)


@pytest.mark.parametrize("depth", DEPTHS)
@settings(max_examples=70 * SCALE, deadline=None)
@given(setups, workloads(with_connector=False))
def test_random_workload(depth: int, setup: Setup, workload: list[Arrival]) -> None:
    run(setup, workload, depth)


@pytest.mark.parametrize("depth", DEPTHS)
@settings(max_examples=90 * SCALE, deadline=None)
@given(setups, workloads(with_connector=True))
def test_random_workload_with_connector(depth: int, setup: Setup, workload: list[Arrival]) -> None:
    run(setup, workload, depth)
