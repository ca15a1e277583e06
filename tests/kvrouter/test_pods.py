"""What the proxy knows of its pods: states, breaker, load."""

from __future__ import annotations

import re

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.config import PodConfig, ProxyConfig
from kvrouter.proxy import pods as pods_module
from kvrouter.proxy.pods import TRANSITIONS, InFlight, PodEvent, PodRegistry, PodState

CONFIG = ProxyConfig(health_failures=2, breaker_failures=3, breaker_cooldown=10.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_registry(clock: Clock | None = None, lost: list[str] | None = None) -> PodRegistry:
    configs = [PodConfig("a", "http://h:1", "m"), PodConfig("b", "http://h:2")]
    return PodRegistry(configs, CONFIG, on_lost=(lost if lost is not None else []).append, clock=clock or Clock())


def names(registry: PodRegistry, model: str = "m", exclude: tuple[str, ...] = ()) -> list[str]:
    return [pod.name for pod in registry.candidates(model, exclude)]


def test_table_in_the_docstring_is_the_table_in_the_code() -> None:
    header, *rows = re.findall(r"^ {4}(\w+ +\|.*)$", pods_module.__doc__ or "", re.MULTILINE)
    events = [re.sub(r"\(.*\)", "", cell).strip() for cell in header.split("|")[1:]]
    drawn = {}
    for row in rows:
        state, *cells = (cell.strip() for cell in row.split("|"))
        for event, cell in zip(events, cells, strict=True):
            if (after := cell.rstrip(" *")) != "-":
                drawn[PodState(state), PodEvent(event)] = PodState(after)
    assert drawn == TRANSITIONS


def test_pod_is_asked_once_it_was_seen_healthy_and_only_for_its_models() -> None:
    registry = make_registry()
    assert names(registry) == []
    registry.health_ok(registry["a"])
    registry.health_ok(registry["b"], ["n", "m"])
    assert names(registry) == ["a", "b"]
    assert names(registry, "n") == ["b"]
    assert names(registry, "x") == []
    assert names(registry, exclude=("a",)) == ["b"]
    assert registry.models() == ["m", "n"]


def test_model_is_announced_when_it_is_learnt_or_changes() -> None:
    learnt: list[tuple[str, str]] = []
    registry = PodRegistry([PodConfig("b", "http://h")], CONFIG, on_model=lambda *news: learnt.append(news))
    for models in (["n", "m"], None, ["n"], ["k"]):
        registry.health_ok(registry["b"], models)
    assert learnt == [("b", "n"), ("b", "k")]


def test_refused_connection_counts_at_once_and_late_checks_after_some() -> None:
    registry = make_registry()
    a = registry["a"]
    registry.health_ok(a)
    registry.health_late(a)
    assert a.state is PodState.UP
    registry.health_ok(a)
    registry.health_late(a)
    assert a.state is PodState.UP
    registry.health_late(a)
    assert a.state is PodState.DOWN
    registry.health_ok(a)
    registry.unreachable(a)
    assert a.state is PodState.DOWN
    assert names(registry) == []


def test_blocks_of_a_pod_are_forgotten_once_when_its_process_is_gone() -> None:
    lost: list[str] = []
    registry = make_registry(lost=lost)
    a = registry["a"]
    registry.health_ok(a)
    for _ in range(3):
        registry.health_late(a)  # slow is not gone
    assert lost == []
    registry.unreachable(a)
    registry.unreachable(a)
    assert lost == ["a"]
    registry.health_ok(a)
    registry.unreachable(a)
    assert lost == ["a", "a"]


def test_breaker_opens_after_errors_in_a_row_and_one_trial_decides() -> None:
    clock = Clock()
    registry = make_registry(clock)
    a = registry["a"]
    registry.health_ok(a)
    for status in (500, 502, 200, 503, 500):
        registry.answered(a, status)
    assert a.state is PodState.UP
    registry.answered(a, 500)
    assert a.state is PodState.OPEN
    registry.health_ok(a)
    assert names(registry) == []
    clock.now = 10.0
    assert names(registry) == ["a"]
    trial = InFlight(a, 5)
    assert names(registry) == []
    registry.answered(a, 500)
    trial.done()
    assert a.state is PodState.OPEN
    assert names(registry) == []
    clock.now = 20.0
    assert names(registry) == ["a"]
    registry.answered(a, 400)  # the client's fault
    assert a.state is PodState.UP


def test_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        make_registry()["x"]


class LoadMachine(RuleBasedStateMachine):
    """The load of a pod is the sum over the requests in flight, whatever order they end in."""

    def __init__(self) -> None:
        super().__init__()
        self.pod = make_registry()["a"]
        self.requests: list[tuple[InFlight, int, str]] = []

    @rule(tokens=st.integers(0, 1000))
    def begin(self, tokens: int) -> None:
        self.requests.append((InFlight(self.pod, tokens), tokens, "prefill"))

    @rule(pick=st.randoms(use_true_random=False))
    def first_byte(self, pick: object) -> None:
        if self.requests:
            at = pick.randrange(len(self.requests))  # type: ignore[attr-defined]
            request, tokens, phase = self.requests[at]
            request.first_byte()
            self.requests[at] = (request, tokens, "done" if phase == "done" else "decode")

    @rule(pick=st.randoms(use_true_random=False))
    def done(self, pick: object) -> None:
        if self.requests:
            at = pick.randrange(len(self.requests))  # type: ignore[attr-defined]
            request, tokens, _ = self.requests[at]
            request.done()
            self.requests[at] = (request, tokens, "done")

    @invariant()
    def load_is_the_sum(self) -> None:
        phases = [phase for _, _, phase in self.requests]
        assert self.pod.num_prefills == phases.count("prefill")
        assert self.pod.num_decodes == phases.count("decode")
        assert self.pod.queued_prefill_tokens == sum(tokens for _, tokens, phase in self.requests if phase == "prefill")


TestLoad = LoadMachine.TestCase
