"""Engines and a router as child processes: started together, ready together, gone together.

```
Stack ── serve (engine pod-0) ── engine core        each child announces its port on a pipe, logs to a file,
      ├─ serve (engine pod-1) ── engine core        and gets SIGTERM from the kernel if the stack itself is killed
      └─ route (router)
```
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstrata.errors import StackError

START_TIMEOUT_S = 180.0
# The router stops first and takes its requests along, so engines have nothing to drain; what they still do is killed.
STOP_TIMEOUT_S = 15.0
LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class StackSpec:
    """What to start."""

    model: str
    num_engines: int = 2
    policy: str = "kv_aware"
    engine_options: tuple[str, ...] = ()
    """Further flags of `kvstrata serve`."""
    cpu_cache_gb: float | None = None
    """Size of each engine's flexkv CPU tier; None runs the engines without a KV connector."""
    block_size: int = 16
    port: int = 0
    """Port of the router on the loopback interface; 0 takes a free one."""


@dataclass(slots=True)
class Child:
    """One server process and the pipe on which it says that it is ready."""

    name: str
    process: subprocess.Popen[bytes]
    ready_fd: int
    log: Path
    port: int | None = None

    @property
    def url(self) -> str:
        """Base address; valid once the child is ready."""
        return f"http://127.0.0.1:{self.port}"


@dataclass(slots=True)
class Stack:
    """Runs a `StackSpec`; a context manager. Not thread-safe."""

    spec: StackSpec
    directory: Path = field(init=False)
    """Private (0700) directory for sockets and logs; removed at the end."""
    engines: list[Child] = field(init=False, default_factory=list)
    router: Child | None = field(init=False, default=None)

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="kvstrata-"))
        with ExitStack() as undo:
            undo.callback(self.close)
            self.engines.extend(self._start_engine(index) for index in range(self.spec.num_engines))
            for engine in self.engines:
                self._wait_ready(engine)
            self.router = self._start_router()
            self._wait_ready(self.router)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Base address of the router."""
        assert self.router is not None, "the stack is not running"
        return self.router.url

    def pod_name(self, index: int) -> str:
        """Name of an engine, as in its event topic and in the router's answers."""
        return f"pod-{index}"

    def events_endpoint(self, index: int) -> str:
        """Where an engine publishes its KV events."""
        return f"ipc://{self.directory}/{self.pod_name(index)}.events"

    def replay_endpoint(self, index: int) -> str:
        """Where an engine replays past KV events."""
        return f"ipc://{self.directory}/{self.pod_name(index)}.replay"

    def restart_engine(self, index: int) -> None:
        """Start an engine anew on the port it had before; it must have died."""
        old = self.engines[index]
        old.process.wait(timeout=STOP_TIMEOUT_S)
        assert old.port is not None
        self.engines[index] = self._start_engine(index, old.port)
        self._wait_ready(self.engines[index])

    def watch(self) -> None:
        """Return never, but in an exception.

        Raises:
            StackError: a process of the stack died.
        """
        with ExitStack() as closing:
            poll, children = select.poll(), {}
            for child in [*self.engines, *([self.router] if self.router else [])]:
                pidfd = os.pidfd_open(child.process.pid)
                closing.callback(os.close, pidfd)
                children[pidfd] = child
                poll.register(pidfd, select.POLLIN)
            dead = children[poll.poll()[0][0]]
            raise StackError(_last_words(dead, f"ended with status {dead.process.wait(STOP_TIMEOUT_S)}"))

    def close(self) -> None:
        """Stop everything: the router first, so that no request loses its engine. Idempotent."""
        for group in ([self.router] if self.router else [], self.engines):
            for child in group:
                child.process.terminate()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for child in group:
                _reap(child, deadline)
        self.router = None
        self.engines.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start_engine(self, index: int, port: int = 0) -> Child:
        spec, name = self.spec, self.pod_name(index)
        events = {
            "endpoint": self.events_endpoint(index),
            "replay_endpoint": self.replay_endpoint(index),
            "topic": f"kv@{name}@{spec.model}",
        }
        flags = ["--port", str(port), "--block-size", str(spec.block_size), "--kv-events-config", json.dumps(events)]
        if spec.cpu_cache_gb is not None:
            connector = {
                "kv_connector": "FlexKVConnectorV1",
                "kv_connector_extra_config": {"cpu_cache_gb": spec.cpu_cache_gb, "runtime_dir": str(self.directory)},
            }
            flags += ["--kv-transfer-config", json.dumps(connector)]
        return self._spawn(name, "serve", [spec.model, *flags, *spec.engine_options])

    def _start_router(self) -> Child:
        flags = ["--policy", self.spec.policy, "--block-size", str(self.spec.block_size)]
        flags += ["--port", str(self.spec.port), "--tokenizer", self.spec.model, "--model", self.spec.model]
        for index, engine in enumerate(self.engines):
            pod = {
                "name": engine.name,
                "url": engine.url,
                "eventsEndpoint": self.events_endpoint(index),
                "replayEndpoint": self.replay_endpoint(index),
            }
            flags += ["--pod", json.dumps(pod)]
        return self._spawn("router", "route", flags)

    def _spawn(self, name: str, command: str, arguments: list[str]) -> Child:
        log = self.directory / f"{name}.log"
        read_fd, write_fd = os.pipe()
        line = [sys.executable, "-m", "kvstrata", command, *arguments]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*line, "--ready-fd", str(write_fd), "--parent-pid", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write_fd],
                # Ctrl-C reaches only the supervisor, which then stops its children in order.
                start_new_session=True,
            )
        os.close(write_fd)
        return Child(name, process, read_fd, log)

    def _wait_ready(self, child: Child) -> None:
        with os.fdopen(child.ready_fd) as pipe:
            readable, _, _ = select.select([pipe], [], [], START_TIMEOUT_S)
            line = pipe.readline() if readable else ""
        if not line:
            ended = f"ended with status {child.process.wait(STOP_TIMEOUT_S)}" if readable else ""
            raise StackError(_last_words(child, ended or f"not ready in {START_TIMEOUT_S:.0f} s"))
        child.port = int(json.loads(line)["port"])


def _last_words(child: Child, what: str) -> str:
    tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    return f"{child.name}: {what}; the end of its log:\n{tail}"


def _reap(child: Child, deadline: float) -> None:
    try:
        child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait(timeout=STOP_TIMEOUT_S)
