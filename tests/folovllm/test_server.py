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
from random import Random
from typing import Any, Literal

import httpx
import openai
import psutil
import pytest

from folovllm.entrypoints.bench.options import ServeOptions
from folovllm.entrypoints.bench.serve import ServerUnusableError, run_serve_bench

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


TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def tools_server(start: Callable[..., Server], small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The same model with a chat template that takes tools."""
    directory = tmp_path_factory.mktemp("tools-model")
    for file in small_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return start(engine={"model": str(directory)})


ENDLESS: dict[str, Any] = {
    "model": MODEL,
    "prompt": [5],
    "max_tokens": 4000,
    "extra_body": {"ignore_eos": True},
}


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


async def test_a_burst_of_leaving_clients_frees_every_block(server: Server) -> None:
    """A hundred clients that leave while they wait, are prefilled or decode, streaming or not."""
    until(lambda: idle(server))
    before = server.metric("vllm:request_success_total")
    random = Random(7)
    host, port = server.url.removeprefix("http://").split(":")

    async def leave(number: int) -> None:
        body = {"prompt": [5 + number] * random.randint(1, 300), "n": random.choice((1, 1, 2)), "max_tokens": 2000}
        body |= {"ignore_eos": True, "stream": random.random() < 0.5}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + content)
        await writer.drain()
        if body["stream"]:
            await reader.readuntil(b"data: ")
            if random.random() < 0.5:
                await reader.readuntil(b"data: ")
        writer.transport.abort() if random.random() < 0.5 else writer.close()

    await asyncio.gather(*map(leave, range(100)))
    until(lambda: idle(server))
    assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    aborted = server.metric('vllm:request_success_total{engine="0",finished_reason="abort"')
    assert aborted > 0
    assert server.metric("vllm:request_success_total") <= before + 200  # some had left before they were read
    with server.client() as client:
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices


def test_metrics_count_what_was_served(server: Server) -> None:
    before = {name: server.metric(f"vllm:{name}_total") for name in ("prompt_tokens", "generation_tokens")}
    with server.client() as client:
        client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    assert server.metric("vllm:prompt_tokens_total") == before["prompt_tokens"] + 3
    assert server.metric("vllm:generation_tokens_total") == before["generation_tokens"] + 4
    assert server.metric("vllm:time_to_first_token_seconds_count") > 0


def test_metrics_tell_phases_and_the_cache(server: Server) -> None:
    with server.client() as client:
        client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"):
        assert server.metric(f"vllm:{name}_count") == server.metric("vllm:e2e_request_latency_seconds_count") > 0
    assert server.metric('vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="520"}') == 1  # fmt: skip # noqa: E501


def test_n_and_logprobs_through_the_official_client(server: Server) -> None:
    with server.client() as client:
        options: dict[str, Any] = {"model": MODEL, "prompt": "the cache is", "max_tokens": 5, "seed": 3, "n": 2}
        whole = client.completions.create(**options, logprobs=2, echo=True, extra_body={"ignore_eos": True})
        assert [choice.index for choice in whole.choices] == [0, 1]
        for choice in whole.choices:
            assert choice.text.startswith("the cache is")
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs is not None
            first, *others = choice.logprobs.token_logprobs
            assert first is None
            assert all(value < 0 for value in others)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 10
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(
            model=MODEL, messages=messages, logprobs=True, top_logprobs=3, max_completion_tokens=4, temperature=0
        )
        [answer] = chat.choices
        assert answer.logprobs is not None
        assert answer.logprobs.content is not None
        for entry in answer.logprobs.content:  # greedy: the chosen token is the likeliest
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].logprob == entry.logprob


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_the_schema(server: Server, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Where, and how long?"}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    with server.client() as client:
        options: dict[str, Any] = {"model": MODEL, "messages": messages, "max_completion_tokens": 200, "seed": 5}
        if stream:
            chunks = client.chat.completions.create(**options, response_format=form, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = client.chat.completions.create(**options, response_format=form).choices[0].message.content or ""
    trip = json.loads(text)
    assert trip["city"] in ("Bonn", "Ulm")
    assert 1 <= trip["days"] <= 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_forced_calls_follow_the_schema(tools_server: Server, choice: Any) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "book", "parameters": SCHEMA}}]
    messages: list[Any] = [{"role": "user", "content": "Book it."}]
    with tools_server.client() as client:
        options: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": tools, "tool_choice": choice}
        options |= {"max_completion_tokens": 300, "parallel_tool_calls": False, "seed": 2}
        answer = client.chat.completions.create(**options).choices[0]
        with client.chat.completions.stream(**options) as stream:
            streamed = stream.get_final_completion().choices[0]
    assert answer.finish_reason == streamed.finish_reason == "tool_calls"
    for message in (answer.message, streamed.message):
        assert not message.content
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.function.name == "book"
        assert json.loads(call.function.arguments)["city"] in ("Bonn", "Ulm")
    assert answer.message.tool_calls is not None
    assert streamed.message.tool_calls is not None
    arguments = [calls[0].function.arguments for calls in (answer.message.tool_calls, streamed.message.tool_calls)]
    assert arguments[0] == arguments[1]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_load_generator_measures_a_server(
    server: Server, tmp_path: Path, endpoint: Literal["completions", "chat"]
) -> None:
    out = tmp_path / "out.json"
    run_serve_bench(
        ServeOptions(
            base_url=server.url, endpoint=endpoint, num_prompts=6, input_len=12, output_len=5, request_rate=200.0,
            max_concurrency=3, range_ratio=0.4, output_json=out,
        )
    )  # fmt: skip
    figures = json.loads(out.read_text())
    assert (figures["completed"], figures["failed"]) == (6, 0)
    for name in ("TTFT (ms)", "TPOT (ms)", "ITL (ms)", "E2EL (ms)"):
        assert figures[name] is None or figures[name]["p50"] <= figures[name]["p90"] <= figures[name]["p99"]
    for name in ("TTFT (ms)", "E2EL (ms)"):  # between tokens it may be none: a short text arrives in one piece
        assert figures[name]["p50"] > 0


def test_load_generator_names_what_is_wrong(server: Server) -> None:
    with pytest.raises(ServerUnusableError, match=r"all 2 requests failed; the first: 404.*'other'"):
        run_serve_bench(ServeOptions(base_url=server.url, endpoint="chat", model="other", num_prompts=2))
    with pytest.raises(ServerUnusableError, match=r"GET http://127\.0\.0\.1:9/v1/models failed"):
        run_serve_bench(ServeOptions(base_url="http://127.0.0.1:9", num_prompts=1))


def test_port_in_use_is_one_line_and_exit_code_2(server: Server, small_model: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    process = launch(small_model, port=port)
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert len(log.splitlines()) == 1, log
    [line] = log.splitlines()
    assert f"port {port} on 127.0.0.1 is in use" in line


def test_missing_model_is_named_and_exit_code_2(tmp_path: Path) -> None:
    process = launch(tmp_path / "nothing")
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert len(log.splitlines()) == 1, log
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
    assert len(log.splitlines()) == 1, log
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
        stream = client.completions.create(**ENDLESS, stream=True)
        next(stream)
        os.kill(server.core.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="exit code -9"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="exit code -9"):
            client.completions.create(**ENDLESS)
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
    except httpx.TransportError:  # it was waiting to be accepted when the socket closed
        return False
    return False


def test_second_signal_ends_at_once(start: Callable[..., Server]) -> None:
    server = start(drain_timeout=DEADLINE_S)
    core = server.core
    with server.client() as client:
        stream = client.completions.create(**ENDLESS, stream=True)
        next(stream)
        os.kill(core.pid, signal.SIGSTOP)  # it would never finish
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
        os.kill(core.pid, signal.SIGCONT)
    assert server.process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    assert not core.is_running()


def test_drain_has_a_deadline(start: Callable[..., Server]) -> None:
    server = start(drain_timeout=1)
    core = server.core
    with server.client() as client:
        stream = client.completions.create(**ENDLESS, stream=True)
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
