"""Mistakes on the command line end in one line that names them, with status 2; nothing is started."""

import socket
import subprocess
import sys

import pytest


def kvstrata(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstrata", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serve", "/no/such/model"], "/no/such/model"),
        (["serve", "MODEL", "--device", "tpu"], "auto, cpu, cuda"),
        (["serve", "MODEL", "--block-size", "0"], "block_size"),
        (["serve", "MODEL", "--kv-transfer-config", "{oops"], "--kv-transfer-config"),
        (["serve", "MODEL", "--kv-transfer-config", '{"kv_conector": "x"}'], "kv_connector"),
        (["serve", "MODEL", "--kv-events-config", "[]"], "--kv-events-config"),
        (["serve", "MODEL", "--kv-transfer-config", '{"kv_connector": "NoSuch"}'], "NoSuch"),
        (["route", "--pod", "nonsense"], "nonsense"),
        (["route", "--pod", "a=http://x", "--policy", "best"], "kv_aware"),
        (["route", "--pod", '{"name": "a", "url": "http://x", "eventEndpoint": "tcp://y"}'], "eventsEndpoint"),
        (["route", "--config", "/no/such/file"], "/no/such/file"),
        (["demo", "--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_mistakes_are_named(arguments, word, small_model):
    result = kvstrata(*[str(small_model) if argument == "MODEL" else argument for argument in arguments])
    assert result.returncode == 2, result.stderr
    assert word in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["serve", "route"])
def test_a_port_in_use_is_named(command, small_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        target = [str(small_model)] if command == "serve" else ["--pod", "a=http://127.0.0.1:9"]
        result = kvstrata(command, *target, "--port", port)
    assert result.returncode == 2, result.stderr
    assert port in result.stderr
    assert "Traceback" not in result.stderr


def test_route_never_loads_torch():
    code = "import sys, kvstrata.cli, kvrouter.proxy.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
