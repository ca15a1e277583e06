"""Whatever way the stack ends, no process, port, socket or shared memory of it stays."""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvstrata.errors import StackError
from kvstrata.stack import Stack, StackSpec

DEADLINE_S = 90


def spec_of(model: Path) -> StackSpec:
    options = ("--num-kv-blocks", "128", "--num-threads", "1", "--max-model-len", "2048")
    return StackSpec(model=str(model), engine_options=options, cpu_cache_gb=0.02)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this process and its children put temporary files, so that what they leave can be told from others'.

    Its path is short, because those of sockets must be.
    """
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def test_close_leaves_nothing(small_model, scratch):
    with Stack(spec_of(small_model)) as stack:
        children = [*stack.engines, stack.router]
        family = [
            process
            for child in children
            for process in (
                psutil.Process(child.process.pid),
                *psutil.Process(child.process.pid).children(recursive=True),
            )
        ]
        ports = {child.port for child in children}
        shared_memory = {name for process in family for name in shared_memory_of(process)}
        assert len(family) > len(children), "an engine core is a process of its own"
        assert shared_memory, "the CPU tier lies in shared memory"
        assert list(scratch.iterdir())
    assert not [process for process in family if process.is_running()]
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert not listening & ports
    assert not list(scratch.iterdir())
    assert not shared_memory & {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}


def shared_memory_of(process: psutil.Process) -> set[str]:
    """Shared memory a process has mapped: named segments and anonymous ones."""
    return {m.path for m in process.memory_maps() if m.path.startswith(("/dev/shm/", "/memfd:"))}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing(small_model, how, scratch):
    demo = start_demo(small_model)
    try:
        output = read_until(demo, "serving at")
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) >= 5, "a router and two engines with their cores"
        demo.send_signal(how)
        status = demo.wait(timeout=DEADLINE_S)
    finally:
        demo.kill()
        demo.wait(timeout=DEADLINE_S)
        demo.stdout.close()
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
    assert not alive
    if how != signal.SIGKILL:  # nobody is left to remove the directory of logs and sockets
        assert not list(scratch.iterdir())


def start_demo(model: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kvstrata", "demo", "--model", str(model), "--users", "4", "--turns", "3", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process: subprocess.Popen[bytes], word: str) -> str:
    text = ""
    while word not in text:
        readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        piece = os.read(process.stdout.fileno(), 65536).decode(errors="replace") if readable else ""
        assert piece, f"the demo ended or stalled before it printed {word!r}:\n{text}"
        text += piece
    return text


def test_demo_writes_its_figures_and_serves_on(small_model, tmp_path):
    figures = tmp_path / "figures.json"
    demo = start_demo(small_model, "--json", str(figures), "--keep")
    try:
        output = read_until(demo, "}'\n")
        curl = shlex.split(next(line for line in output.splitlines() if line.startswith("curl ")))
        answer = subprocess.run(
            [*curl, "-sS", "--max-time", "60"], capture_output=True, text=True, timeout=90, check=True
        )
        demo.send_signal(signal.SIGINT)
        assert demo.wait(timeout=DEADLINE_S) == 130
    finally:
        demo.kill()
        demo.wait(timeout=DEADLINE_S)
        demo.stdout.close()
    assert answer.stdout.rstrip().endswith("data: [DONE]")
    rows = {row["scenario"]: row for row in json.loads(figures.read_text())}
    assert list(rows) == ["kv_aware + flexkv", "kv_aware", "round_robin"]
    assert all(row["num_requests"] == 12 for row in rows.values())
    assert rows["kv_aware"]["follow_up_on_same_pod_share"] == 1.0
    assert rows["kv_aware"]["cached_share"] > rows["round_robin"]["cached_share"]


def test_a_stack_whose_engine_dies_says_so(small_model):
    with Stack(spec_of(small_model)) as stack:
        stack.engines[1].process.kill()
        with pytest.raises(StackError, match="pod-1: ended with status -9"):
            stack.watch()


def test_an_engine_that_cannot_start_is_quoted(tmp_path):
    with pytest.raises(StackError, match=r"no config\.json"), Stack(spec_of(tmp_path)):
        pass
