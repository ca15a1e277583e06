import io
import json

import pytest
from rich.console import Console

from kvstrata.report import as_document, as_table, summarise
from kvstrata.workload import TurnResult


def turn(user: int, number: int, pod: str, *, ttft_s: float = 0.1, cached: int = 0, external: int = 0) -> TurnResult:
    return TurnResult(user, number, pod, ttft_s, 0.5, 100, 10, cached, external, "")


def test_cached_share_is_split_by_source():
    report = summarise("s", [turn(0, 0, "a"), turn(0, 1, "a", cached=80, external=30)], wall_s=2.0)
    assert report.device_cached_share == pytest.approx(0.25)
    assert report.cpu_cached_share == pytest.approx(0.15)
    assert report.cached_share == pytest.approx(0.40)
    assert report.tokens_per_s == pytest.approx(10.0)


def test_requests_and_follow_ups_are_counted_per_pod():
    turns = [turn(0, 0, "a"), turn(0, 1, "a"), turn(1, 0, "b"), turn(1, 1, "a")]
    report = summarise("s", turns, wall_s=1.0)
    assert report.requests_per_pod == {"a": 3, "b": 1}
    assert report.follow_up_on_same_pod_share == pytest.approx(0.5)


def test_percentiles_of_ttft():
    turns = [turn(user, 0, "a", ttft_s=user / 1000) for user in range(1, 11)]
    report = summarise("s", turns, wall_s=1.0)
    assert report.ttft_p50_ms == pytest.approx(5.5)
    assert report.ttft_p90_ms == pytest.approx(10.0)


def test_table_and_document_show_every_scenario():
    reports = [summarise(name, [turn(0, 0, "pod-0")], wall_s=1.0) for name in ("one", "kv_aware + flexkv")]
    console = Console(width=80, file=io.StringIO())
    console.print(as_table(reports))
    text = console.file.getvalue()
    assert "one" in text
    assert "…" not in text, "something was cut off"
    assert [row["scenario"] for row in json.loads(json.dumps(as_document(reports)))] == ["one", "kv_aware + flexkv"]
