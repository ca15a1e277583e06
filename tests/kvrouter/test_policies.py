"""Who gets a request, on made-up caches and loads."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter.config import POLICY_NAMES, PodConfig, ProxyConfig
from kvrouter.errors import ConfigError
from kvrouter.proxy.pods import InFlight, Pod, PodRegistry, PodState
from kvrouter.proxy.policies import POLICIES, KVAware, PromptView, make_policy

CONFIG = ProxyConfig()


def pods(*names: str) -> list[Pod]:
    return [Pod(PodConfig(name, "http://h"), PodState.UP, ("m",)) for name in names]


def kv_aware(seed: int = 1, now: float = 0.0) -> KVAware:
    return KVAware(CONFIG, random.Random(seed), lambda: now)


def test_every_name_makes_its_policy() -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    for name in POLICY_NAMES:
        assert type(make_policy(replace(CONFIG, policy=name))) is POLICIES[name]
    with pytest.raises(ConfigError, match="kv_aware, round_robin"):
        replace(CONFIG, policy="fastest")


def test_round_robin_gives_each_pod_its_turn_though_pods_come_and_go() -> None:
    policy = make_policy(replace(CONFIG, policy="round_robin"))
    a, b, c = pods("a", "b", "c")
    prompt = PromptView(10)
    assert [policy.pick(prompt, [a, b, c]).name for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    assert [policy.pick(prompt, [b, c]).name for _ in range(3)] == ["b", "c", "b"]
    assert policy.pick(prompt, [a, b, c]).name == "a"


def test_the_pod_that_holds_the_prompt_wins() -> None:
    a, b = pods("a", "b")
    assert all(kv_aware(seed).pick(PromptView(1000, {"b": 600.0}), [a, b]) is b for seed in range(20))


def test_longer_prefix_and_better_tier_win() -> None:
    a, b, c = pods("a", "b", "c")
    assert kv_aware().pick(PromptView(1000, {"a": 300.0, "b": 800.0 * 0.8, "c": 800.0}), [a, b, c]) is c


def test_queued_prefill_outweighs_a_cached_prefix_when_it_is_longer() -> None:
    a, b = pods("a", "b")
    prompt = PromptView(1000, {"a": 500.0})
    InFlight(a, 900)
    assert kv_aware().pick(prompt, [a, b]) is a
    InFlight(a, 200)
    assert kv_aware().pick(prompt, [a, b]) is b


def test_running_decodes_cost() -> None:
    a, b = pods("a", "b")
    for _ in range(3):
        InFlight(a, 500).first_byte()
    assert all(kv_aware(seed).pick(PromptView(100), [a, b]) is b for seed in range(20))


def test_equal_pods_are_chosen_at_random_at_first() -> None:
    a, b, c = pods("a", "b", "c")
    first = Counter(kv_aware(seed).pick(PromptView(100), [a, b, c]).name for seed in range(300))
    assert set(first) == {"a", "b", "c"}
    assert min(first.values()) > 50


@pytest.mark.parametrize("num_shared_tokens", [0, 16, 100])
def test_cold_families_spread_over_idle_pods_though_they_share_a_preamble(num_shared_tokens: int) -> None:
    """32 families, one after another, to 8 idle pods: the busiest gets at most twice the mean."""
    for seed in range(20):
        policy = kv_aware(seed)
        fleet = pods(*"abcdefgh")
        have_preamble: set[str] = set()
        chosen: Counter[str] = Counter()
        for _ in range(32):
            prompt = PromptView(1000, {name: float(num_shared_tokens) for name in have_preamble})
            pod = policy.pick(prompt, fleet)
            InFlight(pod, 1000).done()
            have_preamble.add(pod.name)
            chosen[pod.name] += 1
        assert max(chosen.values()) <= 2 * 32 / 8
        assert len(chosen) == 8


def test_conversations_stay_where_they_are_while_new_ones_spread() -> None:
    policy = kv_aware()
    fleet = pods("a", "b")
    home: dict[int, str] = {}
    for turn in range(5):
        for conversation in range(10):
            length = 400 + 150 * turn
            held = {home[conversation]: float(length - 150)} if conversation in home else {}
            pod = policy.pick(PromptView(length, held), fleet)
            assert home.setdefault(conversation, pod.name) == pod.name
    assert sorted(Counter(home.values()).values()) == [5, 5]


def test_a_prompt_that_was_refused_draws_no_later_ones_away() -> None:
    a, b = pods("a", "b")
    chosen = set()
    for seed in range(20):
        policy = kv_aware(seed)
        refused_by = policy.pick(PromptView(5000), [a, b])
        policy.not_computed(PromptView(5000), refused_by)
        chosen.add(policy.pick(PromptView(100), [a, b]) is refused_by)
    assert chosen == {True, False}


def test_new_text_placed_long_ago_counts_no_more() -> None:
    now = 0.0
    policy = KVAware(CONFIG, random.Random(1), lambda: now)
    a, b = pods("a", "b")
    policy.pick(PromptView(100_000), [a])
    assert all(policy.pick(PromptView(1000), [a, b]) is b for _ in range(20))
    now = 3600.0
    assert {policy.pick(PromptView(1000), [a, b]).name for _ in range(20)} == {"a", "b"}


LOADS = st.tuples(st.integers(0, 10_000), st.integers(0, 20))


@given(
    name=st.sampled_from(POLICY_NAMES),
    states=st.lists(st.sampled_from(PodState), min_size=1, max_size=6),
    loads=st.lists(LOADS, min_size=6, max_size=6),
    credit=st.dictionaries(st.sampled_from("012345"), st.floats(0, 4000), max_size=6),
    num_tokens=st.integers(0, 4000),
    seed=st.integers(0, 99),
)
def test_a_pod_that_may_not_be_asked_is_never_picked(
    name: str,
    states: list[PodState],
    loads: list[tuple[int, int]],
    credit: dict[str, float],
    num_tokens: int,
    seed: int,
) -> None:
    registry = PodRegistry([PodConfig(str(i), "http://h", "m") for i in range(len(states))], CONFIG, clock=lambda: 0.0)
    for pod, state, (queued, num_decodes) in zip(registry.pods, states, loads, strict=False):
        pod.state, pod.open_until = state, 1.0
        pod.queued_prefill_tokens, pod.num_decodes = queued, num_decodes
    candidates = registry.candidates("m")
    for pod in candidates:
        assert pod.state is PodState.UP or (pod.state is PodState.HALF_OPEN and pod.num_running == 0)
    if candidates:
        policy = (
            KVAware(CONFIG, random.Random(seed)) if name == "kv_aware" else make_policy(replace(CONFIG, policy=name))
        )
        for _ in range(3):
            assert policy.pick(PromptView(num_tokens, credit), candidates) in candidates


@given(
    loads=st.lists(LOADS, min_size=2, max_size=6),
    credit=st.dictionaries(st.sampled_from("012345"), st.floats(0, 4000), max_size=6),
    num_tokens=st.integers(1, 4000),
)
def test_kv_aware_never_pays_much_more_than_the_least_cost(
    loads: list[tuple[int, int]], credit: dict[str, float], num_tokens: int
) -> None:
    fleet = pods(*[str(i) for i in range(len(loads))])
    for pod, (queued, num_decodes) in zip(fleet, loads, strict=True):
        pod.queued_prefill_tokens, pod.num_decodes = queued, num_decodes
    prompt = PromptView(num_tokens, credit)

    def cost(pod: Pod) -> float:
        load = pod.queued_prefill_tokens + CONFIG.decode_token_cost * pod.num_decodes
        return load + CONFIG.uncached_token_cost * prompt.uncached_tokens(pod.name)

    chosen = kv_aware().pick(prompt, fleet)
    slack = CONFIG.uncached_token_cost * num_tokens / 8
    assert cost(chosen) <= min(cost(pod) for pod in fleet) + slack + 1e-6
