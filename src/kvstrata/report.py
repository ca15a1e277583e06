"""What the demo measured, per scenario: one record, one table, one JSON document."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table

from kvstrata.workload import TurnResult


@dataclass(frozen=True, slots=True)
class ScenarioReport:
    """The figures of one scenario over the whole workload."""

    scenario: str
    num_requests: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    tokens_per_s: float
    """Generated tokens over the wall-clock time of the workload."""
    device_cached_share: float
    """Share of all prompt tokens found in an engine's device memory."""
    cpu_cached_share: float
    """Share of all prompt tokens brought back from the CPU tier."""
    requests_per_pod: dict[str, int]
    follow_up_on_same_pod_share: float
    """Share of turns after the first that went to the pod of the turn before."""
    wall_s: float

    @property
    def cached_share(self) -> float:
        """Share of all prompt tokens that no engine had to compute."""
        return self.device_cached_share + self.cpu_cached_share


def summarise(scenario: str, turns: Sequence[TurnResult], wall_s: float) -> ScenarioReport:
    """Figures of one replayed workload. `turns` must not be empty."""
    ttft_ms = sorted(turn.ttft_s * 1e3 for turn in turns)
    prompt_tokens = sum(turn.prompt_tokens for turn in turns)
    external = sum(turn.external_cached_tokens for turn in turns)
    device = sum(turn.cached_tokens for turn in turns) - external
    pod_of = {(turn.user_id, turn.turn): turn.pod for turn in turns}
    follow_ups = [pod_of[user, turn] == pod_of[user, turn - 1] for user, turn in pod_of if turn > 0]
    return ScenarioReport(
        scenario=scenario,
        num_requests=len(turns),
        ttft_p50_ms=statistics.median(ttft_ms),
        ttft_p90_ms=ttft_ms[min(len(ttft_ms) - 1, int(0.9 * len(ttft_ms)))],
        tokens_per_s=sum(turn.completion_tokens for turn in turns) / wall_s,
        device_cached_share=device / prompt_tokens,
        cpu_cached_share=external / prompt_tokens,
        requests_per_pod=dict(sorted(Counter(turn.pod for turn in turns).items())),
        follow_up_on_same_pod_share=statistics.fmean(follow_ups) if follow_ups else 1.0,
        wall_s=wall_s,
    )


def as_table(reports: Iterable[ScenarioReport]) -> Table:
    """The demo's closing table, at most 80 columns wide."""
    table = Table(
        title="The same conversations, three ways",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    headers = (
        "TTFT\np50 ms",
        "TTFT\np90 ms",
        "tokens\nper s",
        "cached:\ndevice",
        "CPU\ntier",
        "same\npod",
        "requests\nper pod",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            report.scenario,
            f"{report.ttft_p50_ms:.0f}",
            f"{report.ttft_p90_ms:.0f}",
            f"{report.tokens_per_s:.1f}",
            f"{report.device_cached_share:.0%}",
            f"{report.cpu_cached_share:.0%}",
            f"{report.follow_up_on_same_pod_share:.0%}",
            " + ".join(str(count) for count in report.requests_per_pod.values()),
        )
    table.caption = (
        "cached: share of all prompt tokens not computed, by where they were found\n"
        "same pod: share of follow-up turns sent to the pod of the turn before"
    )
    table.caption_justify = "left"
    return table


def as_document(reports: Iterable[ScenarioReport]) -> list[dict[str, object]]:
    """The same figures as plain data for `--json`."""
    return [asdict(report) | {"cached_share": report.cached_share} for report in reports]
