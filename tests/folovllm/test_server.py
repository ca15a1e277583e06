"""The server as a process, with a real model, seen through the official client and through sockets."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

DEADLINE_S = 120
MODEL = "small"
KEY = "sk-test"
MAX_MODEL_LEN = 4096
SCRIPT = """
import json, logging, sys
from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.openai.api_server import run_server
from folovllm.entrypoints.openai.server_options import ServerOptions

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
options = json.loads(sys.argv[1])
run_server(
    EngineArgs.from_options(options.pop("engine")),
    ServerOptions(**options),
    ready_callback=lambda port: print(port, flush=True),
)
"""


def launch(model: Path, port: int = 0, **options: Any) -> subprocess.Popen[str]:
    engine = {
        "model": str(model),
        "served_model_name": MODEL,
        "num_kv_blocks": 520,
        "max_model_len": MAX_MODEL_LEN,
        "num_threads": 1,
        **options.pop("engine", {}),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps({"engine": engine, "port": port, **options})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    @property
    def core(self) -> psutil.Process:
        [child] = psutil.Process(self.process.pid).children()
        return child

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=DEADLINE_S)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def start(small_model: Path) -> Iterator[Callable[..., Server]]:
    servers = []

    def start(**options: Any) -> Server:
        process = launch(small_model, **options)
        servers.append(process)
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            pytest.fail(f"the server did not start: {process.communicate()[1]}")
        return Server(process, f"http://127.0.0.1:{port}")

    yield start
    for process in servers:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    return start()


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; every question is a request that the server answers."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"


def idle(server: Server) -> bool:
    """Whether the core has nothing left to do: only then it resets its prefix cache."""
    return httpx.post(f"{server.url}/reset_prefix_cache").status_code == 200


def test_official_client_completes_and_streams(server: Server) -> None:
    with server.client() as client:
        options: dict[str, Any] = {"model": MODEL, "prompt": "the cache is", "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**options)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text != ""
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_official_client_chats_and_streams(server: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": "tell me about blocks and their hashes, at some length"}]
    assert idle(server)
    with server.client() as client:
        options: dict[str, Any] = {"model": MODEL, "messages": messages, "max_completion_tokens": 10, "seed": 3}
        whole = client.chat.completions.create(**options)
        with client.chat.completions.create(**options, stream=True) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        again = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == text == again.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    cached = []
    for answer in (whole, again):
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert answer.usage.prompt_tokens_details.model_dump()["external_cached_tokens"] == 0
    assert cached == [0, 16 * ((whole.usage.prompt_tokens - 1) // 16)]
    assert [card.id for card in server.client().models.list()] == [MODEL]


def test_cache_salts_do_not_share_blocks(server: Server) -> None:
    cached = []
    for salt in ("alice", "bob", "alice"):
        body = {"model": MODEL, "prompt": [9] * 40, "max_tokens": 1, "cache_salt": salt}
        usage = httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE_S).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, 32]


async def test_requests_in_one_batch_get_what_they_get_alone(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=DEADLINE_S) as client:

        async def ask(number: int) -> str:
            answer = await client.completions.create(
                model=MODEL, prompt=f"question {number}", max_tokens=24, temperature=0.8, seed=number
            )
            return answer.choices[0].text

        together = await asyncio.gather(*map(ask, range(16)))
        assert [await ask(number) for number in (0, 7, 15)] == [together[0], together[7], together[15]]


def test_client_errors_are_those_of_the_official_client(server: Server) -> None:
    with server.client() as client:
        with pytest.raises(openai.NotFoundError, match=f"serves '{MODEL}'"):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 4096") as error:
            client.completions.create(model=MODEL, prompt=[5] * 5000)
        assert error.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="best_of=2 is not supported"):
            client.completions.create(model=MODEL, prompt="x", best_of=2)


def test_malformed_json_is_a_400(server: Server) -> None:
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=b'{"model": "small", "messages": [',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_client_aborts_its_request(server: Server, stream: bool) -> None:
    until(lambda: idle(server))
    before = server.metric("vllm:request_success_total")
    body = json.dumps({"prompt": [5], "max_tokens": 4000, "ignore_eos": True, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            "POST /v1/completions HTTP/1.1",
            "host: x",
            "content-type: application/json",
            f"content-length: {len(body)}",
        )
        connection.sendall("\r\n".join((*head, "", "")).encode() + body)
        until(lambda: server.metric("vllm:num_requests_running") == 1)
    until(lambda: idle(server))
    assert server.metric("vllm:request_success_total") == before + 1
    assert server.metric("vllm:num_requests_running") == 0


def test_metrics_count_what_was_served(server: Server) -> None:
    before = {name: server.metric(f"vllm:{name}_total") for name in ("prompt_tokens", "generation_tokens")}
    with server.client() as client:
        client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    assert server.metric("vllm:prompt_tokens_total") == before["prompt_tokens"] + 3
    assert server.metric("vllm:generation_tokens_total") == before["generation_tokens"] + 4
    assert server.metric("vllm:time_to_first_token_seconds_count") > 0


def test_port_in_use_is_one_line_and_exit_code_2(server: Server, small_model: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    process = launch(small_model, port=port)
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    [line] = log.splitlines()
    assert f"port {port} on 127.0.0.1 is in use" in line


def test_missing_model_is_named_and_exit_code_2(tmp_path: Path) -> None:
    process = launch(tmp_path / "nothing")
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    [line] = log.splitlines()
    assert f"{tmp_path / 'nothing'}" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0 is not allowed"),
        ({"kv_events_config": {"publisher": "smoke"}}, "kv_events_config is not valid"),
        # Only the core, which reads the checkpoint, knows:
        ({"max_model_len": 10**9}, "max_model_len=1000000000 exceeds the model's context"),
    ],
)
def test_bad_option_is_one_line_and_exit_code_2(small_model: Path, options: dict[str, Any], message: str) -> None:
    process = launch(small_model, engine=options)
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    [line] = log.splitlines()
    assert message in line


def test_front_end_never_imports_torch(small_model: Path) -> None:
    code = f"""
import sys
import kvstrata.cli, folovllm.entrypoints.openai.api_server
from folovllm.engine.arg_utils import EngineArgs, resolve_checkpoint
from folovllm.transformers_utils.model_files import read_model_facts
from folovllm.transformers_utils.tokenizer import Tokenizer

EngineArgs.from_options({{"model": {str(small_model)!r}, "kv_events_config": {{}}}}).check()
directory = resolve_checkpoint({str(small_model)!r})
Tokenizer.from_checkpoint(directory), read_model_facts(directory)
print({{"torch", "transformers"}} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_running_front_end_has_not_loaded_torch(server: Server) -> None:
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "uvloop" in mapped
    assert "libtorch" not in mapped
    assert "libtorch" in Path(f"/proc/{server.core.pid}/maps").read_text()


def test_model_the_core_cannot_load_is_reported(small_model: Path, tmp_path: Path) -> None:
    for file in small_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    process = launch(tmp_path)
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert "ERROR the engine did not start" in log.splitlines()[-1]


def test_wrong_api_key_is_refused(start: Callable[..., Server]) -> None:
    server = start(api_key=KEY)
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model=MODEL, prompt="x")
    with server.client(KEY) as client:
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_killed_core_fails_requests_and_health(start: Callable[..., Server]) -> None:
    server = start()
    with server.client() as client:
        options: dict[str, Any] = {
            "model": MODEL,
            "prompt": [5],
            "max_tokens": 4000,
            "extra_body": {"ignore_eos": True},
        }
        stream = client.completions.create(**options, stream=True)
        next(stream)
        os.kill(server.core.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="exit code -9"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="exit code -9"):
            client.completions.create(**options)
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503
    assert health.json()["error"]["code"] == "engine_dead"
    server.process.terminate()
    assert server.process.wait(DEADLINE_S) == 0


def test_sigterm_finishes_what_runs_and_takes_nothing_new(start: Callable[..., Server]) -> None:
    server = start()
    core = server.core
    with server.client() as client:
        options: dict[str, Any] = {"model": MODEL, "prompt": [5], "max_tokens": 600, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server))
        *_, last = stream
        assert last.usage is not None
        assert last.usage.completion_tokens == 600
    assert server.process.wait(DEADLINE_S) == 0
    assert not core.is_running()


def refuses(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/health")
    except httpx.ConnectError:
        return True
    return False


def test_drain_has_a_deadline(start: Callable[..., Server]) -> None:
    server = start(drain_timeout=1)
    core = server.core
    with server.client() as client:
        options: dict[str, Any] = {
            "model": MODEL,
            "prompt": [5],
            "max_tokens": 4000,
            "extra_body": {"ignore_eos": True},
        }
        stream = client.completions.create(**options, stream=True)
        next(stream)
        os.kill(core.pid, signal.SIGSTOP)  # it would never finish
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
        os.kill(core.pid, signal.SIGCONT)
    assert server.process.wait(DEADLINE_S) == 0
    assert not core.is_running()


def test_sigterm_while_loading_stops_at_once(small_model: Path) -> None:
    process = launch(small_model)
    until(lambda: bool(psutil.Process(process.pid).children()))
    [core] = psutil.Process(process.pid).children()
    process.terminate()
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert out == ""
    assert not core.is_running()


def test_core_ends_with_a_killed_server(start: Callable[..., Server]) -> None:
    server = start()
    core = server.core
    server.process.kill()
    core.wait(DEADLINE_S)
