"""The scheduler under random workloads: whatever comes, nothing leaks, nothing is computed from wrong KV, all ends."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, note, settings
from tests.folovllm.core_fakes import (
    FakeConnector,
    FakeRunner,
    check_invariants,
    expected_tokens,
    make_request,
    make_scheduler,
)

from folovllm.core.sched.scheduler import Scheduler
from folovllm.request import RequestStatus
from kvblocks.events import BlockRemoved, BlockStored, KVEvent
from kvblocks.hashing import external_hash

MAX_STEPS = 600


@dataclass(frozen=True)
class Arrival:
    """One request of the workload."""

    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    abort_step: int | None
    hit: tuple[int, bool, int, str] | None
    undecided: int
    send_steps: int
    salt: str | None


@dataclass(frozen=True)
class Setup:
    """One engine."""

    num_blocks: int
    budget: int
    max_num_seqs: int
    chunked: bool
    caching: bool
    policy: str


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
        hit=hits if with_connector else st.none(),
        undecided=st.integers(0, 3) if with_connector else st.just(0),
        send_steps=st.integers(0, 4) if with_connector else st.just(0),
        salt=st.sampled_from([None, None, "tenant"]),
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
    policy=st.sampled_from(["recompute", "recompute", "fail"]),
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
        connector=connector,
        kv_load_failure_policy=setup.policy,
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


def run(setup: Setup, workload: list[Arrival]) -> None:
    names = {f"r{i}": arrival for i, arrival in enumerate(sorted(workload, key=lambda a: a.step))}
    connector = None
    if any(a.hit or a.undecided or a.send_steps for a in workload):
        connector = FakeConnector(
            hits={name: a.hit for name, a in names.items() if a.hit},
            undecided={name: a.undecided for name, a in names.items()},
            sends={name: a.send_steps for name, a in names.items()},
        )
    scheduler, runner, listener = build(setup, connector), FakeRunner(connector=connector), Listener()
    tokens: dict[str, list[int]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    for step in range(MAX_STEPS):
        for name, arrival in names.items():
            if arrival.step == step:
                scheduler.add_request(
                    make_request(name, arrival.prompt, max_tokens=arrival.max_tokens, salt=arrival.salt)
                )
            if arrival.abort_step == step and name in scheduler.requests:
                scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
                reasons[name] = "abort"
        output = scheduler.schedule()
        assert output.total_num_scheduled_tokens <= scheduler.scheduler_config.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.scheduler_config.max_num_seqs
        if connector is None:
            order = [int(request.request_id[1:]) for request in scheduler.running]
            assert order == sorted(order), "first come, first served"
        for emitted in scheduler.update_from_output(output, runner.execute_model(output)):
            assert emitted.request_id not in reasons, "output after the end"
            tokens[emitted.request_id] += emitted.new_token_ids
            assert 0 <= emitted.num_external_cached_tokens <= emitted.num_cached_tokens
            if emitted.finish_reason:
                reasons[emitted.request_id] = emitted.finish_reason
        check_invariants(scheduler, runner)
        listener.take(scheduler.kv_cache_manager.take_events())
        listener.check(scheduler)
        if step > 25 and not scheduler.has_work:
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
        if reasons[name] == "length":
            assert len(tokens[name]) == min(arrival.max_tokens, 64 - len(arrival.prompt))
        if reasons[name] == "error":
            needed = len(arrival.prompt) + arrival.max_tokens - 1
            may_fail = setup.policy == "fail"  # its load, or that of a request whose blocks it shares
            assert needed > scheduler.capacity_tokens or may_fail, "an error for a request that fits"


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logging.getLogger("folovllm.core.sched").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("folovllm.core.sched").setLevel(logging.NOTSET)


@settings(max_examples=250, deadline=None)
@given(setups, workloads(with_connector=False))
def test_random_workload(setup: Setup, workload: list[Arrival]) -> None:
    run(setup, workload)


@settings(max_examples=350, deadline=None)
@given(setups, workloads(with_connector=True))
def test_random_workload_with_connector(setup: Setup, workload: list[Arrival]) -> None:
    run(setup, workload)
