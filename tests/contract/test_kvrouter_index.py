"""One suite that every index backend passes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry

from kvrouter.errors import InvalidKeysError
from kvrouter.kvblock.base import Index, PodEntry
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.instrumented_index import InstrumentedIndex
from kvrouter.kvblock_scorer import LongestPrefixScorer
from kvrouter.metrics.collector import IndexMetrics

BACKENDS: dict[str, Callable[[], Index]] = {
    "in_memory": lambda: InMemoryIndex(size=100_000),
    "instrumented": lambda: InstrumentedIndex(InMemoryIndex(size=100_000), IndexMetrics(CollectorRegistry())),
}

A, B = PodEntry("A"), PodEntry("B")
A_CPU, B_CPU = PodEntry("A", "cpu"), PodEntry("B", "cpu")
WEIGHTS = {"gpu": 1.0, "cpu": 0.5}


@pytest.fixture(params=BACKENDS)
def index(request: pytest.FixtureRequest) -> Index:
    return BACKENDS[request.param]()


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_lookup_returns_holders_up_to_the_first_key_nobody_holds(index: Index) -> None:
    index.add(None, keys(1, 2, 4), [A, B_CPU])
    assert index.lookup(keys(1, 2, 3, 4)) == {1: [A, B_CPU], 2: [A, B_CPU]}
    assert index.lookup(keys(3, 4)) == {}
    assert index.lookup(keys()) == {}


def test_lookup_answers_for_the_pods_asked_about(index: Index) -> None:
    index.add(None, keys(1, 2), [A])
    index.add(None, keys(1, 2, 3), [B])
    assert index.lookup(keys(1, 2, 3), pods=["A", "nobody"]) == {1: [A], 2: [A]}
    assert index.lookup(keys(1), pods=[]) == {}
    assert index.score(keys(1, 2, 3), pods=["B"]) == {"B": 3.0}
    assert index.score(keys(1), pods=[]) == {}


def test_score_counts_the_run_from_the_first_key(index: Index) -> None:
    index.add(None, keys(1001, 1002), [A])
    index.add(None, keys(1003), [A, A_CPU])
    index.add(None, keys(1004, 1005), [B_CPU])
    index.add(None, keys(1006), [A])
    assert index.score(np.arange(1001, 1007, dtype=np.uint64), weights=WEIGHTS) == {"A": 3.0}


def test_score_keeps_what_a_pod_had_when_its_run_ends(index: Index) -> None:
    index.add(None, keys(1, 2), [A, B])
    index.add(None, keys(3), [A])
    assert index.score(keys(1, 2, 3)) == {"A": 3.0, "B": 2.0}


def test_score_weighs_tiers(index: Index) -> None:
    index.add(None, keys(1), [A])
    index.add(None, keys(2), [A_CPU])
    assert index.score(keys(1, 2)) == {"A": pytest.approx(1.8)}
    index.add(None, keys(2), [PodEntry("A", "exotic")])
    assert index.score(keys(1, 2)) == {"A": 2.0}, "unknown tiers weigh 1.0, and the best tier counts"


def test_eviction_matches_the_whole_identity(index: Index) -> None:
    entries = [A, A_CPU, PodEntry("A", "gpu", group=1), PodEntry("A", "gpu", rank=1)]
    index.add(keys(50), keys(1), entries)
    for evicted in entries:
        index.evict(50, [evicted])
        entries = [entry for entry in entries if entry != evicted]
        assert index.lookup(keys(1)) == ({1: entries} if entries else {})


def test_repeated_adds_need_as_many_evictions(index: Index) -> None:
    index.add(keys(50), keys(1), [A])
    index.add(keys(50), keys(1), [A])
    index.evict(50, [A])
    assert index.lookup(keys(1)) == {1: [A]}
    index.evict(50, [A])
    assert index.lookup(keys(1)) == {}
    index.evict(50, [A])
    index.add(keys(50), keys(1), [A])
    assert index.lookup(keys(1)) == {1: [A]}, "an eviction too many is not owed"


def test_two_engine_keys_may_name_one_block(index: Index) -> None:
    index.add(keys(50), keys(1), [A])
    index.add(keys(51), keys(1), [A])
    for _ in range(3):
        index.evict(50, [A])
    assert index.lookup(keys(1)) == {1: [A]}
    index.evict(51, [A])
    assert index.lookup(keys(1)) == {}


def test_engine_key_that_names_another_block_now_lets_go_of_the_old_one(index: Index) -> None:
    index.add(keys(50), keys(1), [A])
    index.add(keys(50), keys(2), [A])
    assert index.lookup(keys(1)) == {}
    assert index.lookup(keys(2)) == {2: [A]}


def test_unknown_block_is_no_error(index: Index) -> None:
    index.evict(50, [A])
    assert index.clear("A") == 0
    assert index.get_request_key(50) is None
    index.add(keys(50), keys(1), [A])
    index.evict(50, [B])
    index.evict(50, [A_CPU])
    assert index.lookup(keys(1)) == {1: [A]}


def test_clear_forgets_one_pod(index: Index) -> None:
    index.add(None, keys(*range(100)), [A, A_CPU, B])
    assert index.clear("A") == 200
    assert index.lookup(keys(*range(100))) == {key: [B] for key in range(100)}
    assert index.clear("A") == 0


def test_clear_forgets_one_rank(index: Index) -> None:
    index.add(None, keys(1), [A, PodEntry("A", rank=1)])
    assert index.clear("A", rank=1) == 1
    assert index.lookup(keys(1)) == {1: [A]}


def test_engine_key_leads_to_its_request_key(index: Index) -> None:
    index.add(keys(50, 51), keys(1, 2), [A])
    assert index.get_request_key(51) == 2
    index.evict(51, [A])
    assert index.get_request_key(51) is None


def test_engine_block_may_cover_several_keys(index: Index) -> None:
    index.add(keys(50, 51), keys(1, 2, 3, 4), [A])
    assert index.get_request_key(50) == 2
    index.evict(51, [A])
    assert index.lookup(keys(1, 2, 3, 4)) == {1: [A], 2: [A]}


def test_key_may_take_several_engine_blocks(index: Index) -> None:
    index.add(keys(50, 51, 52, 53), keys(1, 2), [A])
    assert index.lookup(keys(1, 2)) == {1: [A], 2: [A]}
    index.evict(53, [A])
    assert index.lookup(keys(1, 2)) == {1: [A]}


@pytest.mark.parametrize(
    ("engine_keys", "request_keys"), [([1, 2], [1, 2, 3]), ([], [1]), ([1], []), ([-1], [1]), (["x"], [1])]
)
def test_keys_that_do_not_fit_are_refused(index: Index, engine_keys: list[int], request_keys: list[int]) -> None:
    with pytest.raises(InvalidKeysError):
        index.add(engine_keys, request_keys, [A])


def test_arrays_of_another_type_are_refused(index: Index) -> None:
    with pytest.raises(InvalidKeysError, match="uint64"):
        index.lookup(np.array([1, 2], np.int64))


def test_threads_may_do_everything_at_once(index: Index) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(20)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        entry = PodEntry(f"pod-{number % 5}", ("gpu", "cpu")[number % 2])
        try:
            barrier.wait(30)
            for _ in range(50):
                some = rng.integers(0, 200, 20).astype(np.uint64)
                index.add(None, some, [entry])
                index.lookup(some)
                index.score(some)
                index.evict(int(some[0]), [entry])
                index.get_request_key(int(some[1]))
                if rng.random() < 0.1:
                    index.clear(entry.pod)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for i in range(5):
        index.clear(f"pod-{i}")
    for key in range(200):
        assert index.lookup([key]) == {}


ENTRIES = [PodEntry(pod, tier, rank=rank) for pod in "ABC" for tier in ("gpu", "cpu") for rank in (0, 1)]
KEY = st.integers(0, 11)
ALIAS = st.sampled_from((100, 200))


class IndexModel(RuleBasedStateMachine):
    """Any backend against the simplest thing that could be right."""

    make_index: Callable[[], Index]
    added = Bundle("added")

    def __init__(self) -> None:
        super().__init__()
        self.index = type(self).make_index()
        self.records: Counter[tuple[int, PodEntry]] = Counter()  # (engine key, holder) -> references

    def holders(self, key: int) -> set[PodEntry]:
        return {entry for (engine_key, entry), count in self.records.items() if count and engine_key % 100 == key}

    @rule(
        start=KEY,
        length=st.integers(1, 6),
        alias=ALIAS,
        entries=st.sets(st.sampled_from(ENTRIES)),
    )
    def add(self, start: int, length: int, alias: int, entries: set[PodEntry]) -> None:
        request = np.arange(start, start + length, dtype=np.uint64)
        self.index.add(request + np.uint64(alias), request, list(entries))
        for key in request.tolist():
            for entry in entries:
                self.records[key + alias, entry] += 1

    @rule(key=KEY, alias=ALIAS, entry=st.sampled_from(ENTRIES))
    def evict(self, key: int, alias: int, entry: PodEntry) -> None:
        self.index.evict(key + alias, [entry])
        if self.records[key + alias, entry]:
            self.records[key + alias, entry] -= 1

    @rule(pod=st.sampled_from("ABC"), rank=st.sampled_from((None, 0, 1)))
    def clear(self, pod: str, rank: int | None) -> None:
        gone = [r for r, n in self.records.items() if n and r[1].pod == pod and rank in (None, r[1].rank)]
        assert self.index.clear(pod, rank) == len(gone)
        for record in gone:
            del self.records[record]

    @rule(start=KEY, length=st.integers(0, 12), pods=st.none() | st.sets(st.sampled_from("ABC")))
    def lookup_and_score(self, start: int, length: int, pods: set[str] | None) -> None:
        asked = list(range(start, start + length))
        expected: dict[int, set[PodEntry]] = {}
        for key in asked:
            holders = {entry for entry in self.holders(key) if pods is None or entry.pod in pods}
            if not holders:
                break
            expected[key] = holders
        names = None if pods is None else sorted(pods)
        found = self.index.lookup(asked, names)
        assert {key: set(entries) for key, entries in found.items()} == expected
        assert all(len(entries) == len(set(entries)) for entries in found.values())
        for weights in (None, WEIGHTS):
            scores = self.index.score(asked, names, weights)
            assert scores == pytest.approx(LongestPrefixScorer(weights).score(asked, expected_lists(expected)))

    @invariant()
    def engine_keys_are_known_while_held(self) -> None:
        held = {engine_key for (engine_key, _), count in self.records.items() if count}
        for engine_key in (100, 105, 211):
            expected = engine_key % 100 if engine_key in held else None
            assert self.index.get_request_key(engine_key) == expected


def expected_lists(expected: dict[int, set[PodEntry]]) -> dict[int, list[PodEntry]]:
    return {key: list(entries) for key, entries in expected.items()}


def _model_test(backend: str) -> type:
    machine = type(f"Model_{backend}", (IndexModel,), {"make_index": staticmethod(lambda: make_roomy(backend))})
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    return machine.TestCase


def make_roomy(backend: str) -> Index:
    """Make a backend whose bounds the model cannot reach."""
    if backend == "in_memory":
        return InMemoryIndex(size=1000, pod_cache_size=len(ENTRIES))
    raise AssertionError(backend)


TestInMemoryModel = _model_test("in_memory")
