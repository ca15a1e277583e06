"""Servers of the remote stores, as real processes: redis-server, moto (S3 over HTTP), mooncake_master."""

import functools
import http.client
import importlib.util
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

PATIENCE_S = 60.0


class ServerProcess:
    """A process that is up once it has written a line that matches `ready`; `groups` are that match's."""

    def __init__(self, arguments: list[str], ready: str) -> None:
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._ready = re.compile(ready)
        self._is_ready = threading.Event()
        self.groups: tuple[str, ...] = ()
        self._lines: deque[str] = deque(maxlen=30)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if not self._is_ready.is_set() and (match := self._ready.search(line)):
                self.groups = match.groups()
                self._is_ready.set()
        self._is_ready.set()  # the end: nobody has to wait for what will not come

    def wait_ready(self) -> bool:
        """Return whether it is up; False when it has ended, as when its port was taken by another."""
        assert self._is_ready.wait(PATIENCE_S), f"not ready: {''.join(self._lines)}"
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Server:
    """One server that can be killed and started again at the same address."""

    def __init__(self) -> None:
        self.port = 0
        for _ in range(10):
            self.port = free_port()
            self._server = self._launch()
            if self._server.wait_ready():
                return
            self._server.kill()
        raise AssertionError("no port could be had")

    def _launch(self) -> ServerProcess:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        return self._server.process.pid

    def kill(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server = self._launch()
        assert self._server.wait_ready(), "the server did not come back"


class RedisServer(Server):
    def __init__(self, *options: str) -> None:
        self._options = options
        super().__init__()

    def _launch(self) -> ServerProcess:
        arguments = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]
        return ServerProcess([*arguments, str(self.port), *self._options], "Ready to accept connections")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class S3Server(Server):
    bucket = "blocks"

    def _launch(self) -> ServerProcess:
        arguments = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port"]
        server = ServerProcess([*arguments, str(self.port)], "Running on http")
        if server.wait_ready():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
            connection.request("PUT", f"/{self.bucket}")
            assert connection.getresponse().status == 200
            connection.close()
        return server

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return s3_url(self.endpoint)


class MooncakeServer(Server):
    def _launch(self) -> ServerProcess:
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        master = Path(next(iter(spec.submodule_search_locations))) / "mooncake_master"
        arguments = [str(master), "--rpc_address=127.0.0.1", f"--rpc_port={self.port}", "--metrics_host=127.0.0.1"]
        options = ["--metrics_port=0", "--enable_http_metadata_server=false", "--logtostderr"]
        return ServerProcess([*arguments, *options], "admin server started")

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.port}?segment_mb=256"


def s3_url(endpoint: str) -> str:
    keys = "access_key_id=test&secret_access_key=test"
    return f"s3://{S3Server.bucket}/some/prefix?endpoint={endpoint}&region=us-east-1&{keys}"


def require_backend(kind: str) -> None:
    """Skip the test when the client or server of a backend is not installed."""
    if kind == "redis":
        pytest.importorskip("redis")
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed")
    if kind == "s3":
        pytest.importorskip("obstore")
        pytest.importorskip("flask_cors")
        if importlib.util.find_spec("moto") is None:
            pytest.skip("moto is not installed")
    if kind == "mooncake" and (problem := mooncake_problem()):
        pytest.skip(f"the Mooncake client cannot be loaded: {problem}")


@functools.cache
def mooncake_problem() -> str:
    """Return why the library does not load here, such as a system library that it lacks; not in this process."""
    trial = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True)
    return "" if trial.returncode == 0 else (trial.stderr.strip().splitlines() or ["it crashed"])[-1]


def free_port() -> int:
    """Return a port below those that the system gives to outgoing connections: it stays free while a server is down."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def soon(seconds: float = PATIENCE_S) -> float:
    """Return a deadline that is only there to end a test that hangs."""
    return time.monotonic() + seconds


def eventually(holds) -> None:
    """Ask again and again, with a pause, until it holds."""
    end, pause = soon(), threading.Event()
    while not holds():
        assert time.monotonic() < end, "it never came true"
        pause.wait(0.05)
