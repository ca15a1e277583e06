"""The router as a process: it listens, says when it is ready, and ends cleanly when told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.kvrouter.openai_pod import pod_process

from kvrouter.config import ProxyConfig, RouterConfig, load_config
from kvrouter.errors import ConfigError, ListenError, TokenizerLoadError
from kvrouter.proxy.serve import open_listener, run_router

TIMEOUT_S = 30.0
PROGRAM = """
import json, sys
from kvrouter.config import load_config
from kvrouter.proxy.serve import run_router
run_router(load_config(json.loads(sys.argv[1])), port=0, on_ready=lambda port: print(port, flush=True))
"""
CONFIG = {"pods": [{"name": "a", "url": "http://127.0.0.1:9", "model": "m"}]}


@contextmanager
def router_process(config: dict[str, object]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(TIMEOUT_S)
        process.stdout.close()
        process.stderr.close()


def complete(port: int, **fields: object) -> urllib.request.Request:
    body = json.dumps({"model": "m", "prompt": "hello", **fields}).encode()
    return urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_router_serves_at_once_and_ends_cleanly_on_a_signal(number: signal.Signals) -> None:
    with pod_process("a") as pod:
        config = {"pods": [{"name": "a", "url": pod.url, "eventsEndpoint": "tcp://127.0.0.1:9"}]}
        with router_process(config) as (process, port):
            with urllib.request.urlopen(complete(port), timeout=TIMEOUT_S) as response:
                assert response.headers["x-kvstrata-pod"] == "a"
            process.send_signal(number)
            assert process.wait(TIMEOUT_S) == 0
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_router_without_a_reachable_pod_is_ready_all_the_same() -> None:
    with router_process(CONFIG) as (process, port):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(complete(port), timeout=TIMEOUT_S)
        with caught.value as error:
            assert error.code == 503
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


def test_process_has_no_torch_and_no_transformers() -> None:
    program = "import sys, kvrouter.proxy.serve; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert done.stdout.strip() == "[]"


def test_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use"):
            run_router(load_config(dict(CONFIG)), port=port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 0), ("no such host", 0)])
def test_address_that_cannot_be_is_refused(host: str, port: int) -> None:
    with pytest.raises(ListenError, match="cannot listen on"):
        open_listener(host, port)


def test_router_without_pods_or_tokenizer_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pods: at least one"):
        run_router(RouterConfig(proxy_config=ProxyConfig()), port=0)
    broken = CONFIG | {"tokenizersPoolConfig": {"local": {"modelTokenizerMap": {"m": str(tmp_path)}}}}
    with pytest.raises(TokenizerLoadError):
        run_router(load_config(broken), port=0)
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith("kvrouter")]


def test_nothing_is_left_open_by_a_router_that_could_not_start() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError):
        run_router(RouterConfig(), port=0)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
