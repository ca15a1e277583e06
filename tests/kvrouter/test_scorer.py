"""The plain scorer, on the examples that define scoring."""

from __future__ import annotations

import pytest

from kvrouter.kvblock.base import PodEntry
from kvrouter.kvblock_scorer import LongestPrefixScorer

A, B = PodEntry("A"), PodEntry("B")
A_CPU, B_CPU = PodEntry("A", "cpu"), PodEntry("B", "cpu")


def test_run_ends_where_a_pod_misses_a_key() -> None:
    entries = {1001: [A], 1002: [A], 1003: [A, A_CPU], 1004: [B_CPU], 1005: [B_CPU], 1006: [A]}
    assert LongestPrefixScorer({"gpu": 1.0, "cpu": 0.5}).score(range(1001, 1007), entries) == {"A": 3.0}


def test_pods_share_a_prefix() -> None:
    assert LongestPrefixScorer().score([1, 2, 3], {1: [A, B], 2: [A, B], 3: [A]}) == {"A": 3.0, "B": 2.0}


def test_tiers_have_default_weights() -> None:
    assert LongestPrefixScorer().score([1, 2], {1: [A], 2: [A_CPU]}) == {"A": pytest.approx(1.8)}
    assert LongestPrefixScorer().score([1], {1: [PodEntry("A", "unheard-of")]}) == {"A": 1.0}
    assert LongestPrefixScorer({"gpu": -1.0}).score([1], {1: [A]}) == {"A": -1.0}


def test_pod_without_the_first_key_does_not_appear() -> None:
    assert LongestPrefixScorer().score([1, 2], {1: [A], 2: [A, B]}) == {"A": 2.0}
    assert LongestPrefixScorer().score([1, 2], {2: [A]}) == {}
    assert LongestPrefixScorer().score([], {1: [A]}) == {}
