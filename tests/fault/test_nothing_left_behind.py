"""Whatever way the stack ends, no process, port, socket or shared memory of it stays."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from kvstrata.stack import Stack, StackSpec

DEADLINE_S = 90


def spec_of(model: Path) -> StackSpec:
    options = ("--num-kv-blocks", "128", "--num-threads", "1", "--max-model-len", "2048")
    return StackSpec(model=str(model), engine_options=options, cpu_cache_gb=0.02)


def traces() -> set[str]:
    """Files the stack makes outside its own directory, and its directories."""
    return {
        f"{directory}/{name}"
        for directory in ("/dev/shm", tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir()))
        if os.path.isdir(directory)
        for name in os.listdir(directory)
        if "kvstrata" in name or "flexkv" in name or "folovllm" in name
    }


def test_close_leaves_nothing(small_model):
    before = traces()
    with Stack(spec_of(small_model)) as stack:
        family = psutil.Process().children(recursive=True)
        ports = [child.port for child in [*stack.engines, stack.router]]
        pids = {child.process.pid for child in [*stack.engines, stack.router]}
        assert pids <= {process.pid for process in family}
        assert len(traces() - before) >= 1
    _, alive = psutil.wait_procs([p for p in family if p.pid in pids or "kvstrata" in " ".join(safe_cmdline(p))], 5)
    assert not alive
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert not listening & set(ports)
    assert traces() <= before


def safe_cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing(small_model, how, tmp_path):
    before = traces()
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "kvstrata", "demo", "--model", str(small_model), "--users", "4", "--turns", "2"]
    demo = subprocess.Popen(
        [*command, "--keep"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )
    try:
        output = read_until(demo, "curl")
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) >= 3
        demo.send_signal(how)
        status = demo.wait(timeout=DEADLINE_S)
    finally:
        demo.kill()
        demo.stdout.close()
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
    assert not alive
    assert traces() <= before
    if how != signal.SIGKILL:
        assert not list(tmp_path.iterdir())


def read_until(process: subprocess.Popen[str], word: str) -> str:
    text = ""
    while word not in text:
        readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        piece = os.read(process.stdout.fileno(), 65536).decode() if readable else ""
        assert piece, f"the demo ended or stalled before it printed {word!r}:\n{text}"
        text += piece
    return text


def test_demo_writes_its_figures(small_model, tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "kvstrata", "demo", "--model", str(small_model), "--users", "4", "--turns", "3"]
    result = subprocess.run(
        [*command, "--json", str(figures)], capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["scenario"]: row for row in json.loads(figures.read_text())}
    assert list(rows) == ["kv_aware + flexkv", "kv_aware", "round_robin"]
    assert all(row["num_requests"] == 12 for row in rows.values())
    assert rows["kv_aware"]["follow_up_on_same_pod_share"] == 1.0
    assert rows["kv_aware"]["cached_share"] > rows["round_robin"]["cached_share"]
