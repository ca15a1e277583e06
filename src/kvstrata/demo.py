"""The demo: two engines, a tiered KV cache and a router serve one multi-turn workload in three configurations."""

import asyncio
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvstrata.demo_model import DEMO_MODEL
from kvstrata.report import ScenarioReport, as_document, as_table, summarise
from kvstrata.stack import Stack, StackSpec
from kvstrata.workload import TurnResult, WorkloadSpec, ask, replay

BLOCK_SIZE = 16
WARM_UP_TOKENS = 4
SAMPLE_QUESTION = "What does str.split do?"
SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to serve the workload."""

    name: str
    policy: str
    with_store: bool


SCENARIOS = (
    Scenario("kv_aware + flexkv", "kv_aware", with_store=True),
    Scenario("kv_aware", "kv_aware", with_store=False),
    Scenario("round_robin", "round_robin", with_store=False),
)


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the user may choose."""

    model: str | None = None
    """Checkpoint directory or hub id; None takes strata-tiny, which comes with this package."""
    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    num_engines: int = 2
    device_cache_tokens: int = 4608
    """Size of each engine's device pool: small on purpose, so that conversations outgrow it."""
    cpu_cache_gb: float = 0.5
    max_model_len: int = 4096
    port: int = 0
    keep: bool = False
    json_file: Path | None = None


def run_demo(options: DemoOptions, console: Console) -> list[ScenarioReport]:
    """Run every scenario, print the table, and with `keep` serve on until interrupted.

    Raises:
        StackError: a process did not start or died.
        aiohttp.ClientError: a request failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything started has been stopped.
    """
    model = options.model or str(DEMO_MODEL)
    with _stops_on_signals():
        reports = _run_scenarios(options, model, console)
        console.print(as_table(reports))
        if options.json_file:
            options.json_file.write_text(json.dumps(as_document(reports), indent=2) + "\n")
            console.print(f"figures written to {options.json_file}")
        if options.keep:
            _serve_until_interrupted(options, model, console)
    return reports


def stack_spec(options: DemoOptions, scenario: Scenario, model: str) -> StackSpec:
    """The processes of one scenario; the engines share the machine's cores evenly."""
    flags = {
        "--num-kv-blocks": options.device_cache_tokens // BLOCK_SIZE,
        "--max-model-len": options.max_model_len,
        "--num-threads": max(1, (os.cpu_count() or 1) // options.num_engines),
    }
    return StackSpec(
        model=model,
        num_engines=options.num_engines,
        policy=scenario.policy,
        engine_options=tuple(str(word) for pair in flags.items() for word in pair),
        cpu_cache_gb=options.cpu_cache_gb if scenario.with_store else None,
        block_size=BLOCK_SIZE,
        port=options.port,
    )


def _run_scenarios(options: DemoOptions, model: str, console: Console) -> list[ScenarioReport]:
    columns = TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    reports = []
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        num_turns = options.workload.num_users * options.workload.num_turns
        tasks = [progress.add_task(s.name, total=num_turns, start=False, note="") for s in SCENARIOS]
        for scenario, task in zip(SCENARIOS, tasks, strict=True):
            progress.update(task, note=f"starting {options.num_engines} engines and a router")
            with Stack(stack_spec(options, scenario, model)) as stack:
                console.print(f"{scenario.name}: serving at {stack.url}", style="dim", highlight=False)
                progress.start_task(task)
                reports.append(_run_scenario(scenario, stack, options.workload, _ProgressNote(progress, task)))
                if scenario is SCENARIOS[0]:
                    _print_sample(stack, console)
    return reports


def _run_scenario(scenario: Scenario, stack: Stack, workload: WorkloadSpec, on_turn: "_ProgressNote") -> ScenarioReport:
    asyncio.run(_warm_up(stack))
    start = time.perf_counter()
    turns = asyncio.run(replay(stack.url, stack.spec.model, workload, on_turn))
    return summarise(scenario.name, turns, time.perf_counter() - start)


async def _warm_up(stack: Stack) -> None:
    """One unrelated request to every engine, so that none pays its first-request costs inside the measurement."""
    messages = [{"role": "user", "content": "Are you there?"}]
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        for engine in stack.engines:
            await ask(session, engine.url, stack.spec.model, messages, WARM_UP_TOKENS)


def _print_sample(stack: Stack, console: Console) -> None:
    """What the model is like: one short question and its answer."""

    async def answer() -> TurnResult:
        messages = [{"role": "user", "content": SAMPLE_QUESTION}]
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            return await ask(session, stack.url, stack.spec.model, messages, SAMPLE_TOKENS)

    text = asyncio.run(answer()).text
    console.print(f"  user:  {SAMPLE_QUESTION}\n  model: {text}", markup=False, highlight=False)


def _serve_until_interrupted(options: DemoOptions, model: str, console: Console) -> None:
    with Stack(stack_spec(options, SCENARIOS[0], model)) as stack:
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": True})
        console.print("\nserving until Ctrl-C; try:")
        console.print(
            f"curl -N {stack.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
        stack.watch()


class _ProgressNote:
    """Moves a scenario's bar on with each turn, and shows the TTFT so far beside it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._ttft_ms: list[float] = []

    def __call__(self, turn: TurnResult) -> None:
        self._ttft_ms.append(turn.ttft_s * 1e3)
        note = f"TTFT p50 {statistics.median(self._ttft_ms):.0f} ms"
        self._progress.update(self._task, advance=1, note=note)


@contextmanager
def _stops_on_signals() -> Iterator[None]:
    """Let SIGTERM unwind the stack the way Ctrl-C does, and Ctrl-C also where a shell had it ignored."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
