"""The command line: `kvstrata serve | route | demo`. Options are parsed here, once; the work is done elsewhere.

An option left out is None here and takes the default declared where it belongs (`EngineArgs`, `RouterConfig`, ...).
Each command imports what it needs when it runs, so that `route` loads no engine, and of `serve` only the engine core,
a process of its own, loads torch.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kvstrata import lifeline

EXIT_BAD_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="An LLM serving stack built around the KV cache.", no_args_is_help=True, pretty_exceptions_enable=False
)


def _option(help_text: str, **more: Any) -> Any:
    return typer.Option(help=help_text, show_default=False, **more)


Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
ReadyFd = Annotated[int | None, _option("Announce the served port on this file descriptor.", hidden=True)]
ParentPid = Annotated[int | None, _option("Stop when this process, the parent, dies.", hidden=True)]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face hub id.")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Annotated[str | None, _option("Require this bearer token.")] = None,
    served_model_name: Annotated[str | None, _option("Name of the model in the API.")] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, _option("auto, float32, bfloat16 or float16.")] = None,
    max_model_len: Annotated[int | None, _option("Longest prompt plus output, in tokens.")] = None,
    max_num_seqs: Annotated[int | None, _option("Most requests in one step.")] = None,
    max_num_batched_tokens: Annotated[int | None, _option("Most tokens in one step.")] = None,
    block_size: Annotated[int | None, _option("Tokens of one KV block.")] = None,
    num_kv_blocks: Annotated[int | None, _option("Blocks of the device's KV pool.")] = None,
    kv_cache_memory_gb: Annotated[float | None, _option("Size of that pool instead.")] = None,
    enable_prefix_caching: Annotated[bool | None, _option("Reuse the KV of shared prefixes.")] = None,
    attention_backend: Annotated[str | None, _option("auto, torch_naive or torch_sdpa.")] = None,
    seed: Annotated[int | None, _option("Seed of the requests that bring none.")] = None,
    num_threads: Annotated[int | None, _option("Threads of the model's arithmetic on a CPU.")] = None,
    kv_transfer_config: Annotated[str | None, _option("KV connector, as JSON.")] = None,
    kv_events_config: Annotated[str | None, _option("KV event publisher, as JSON.")] = None,
    ready_fd: ReadyFd = None,
    parent_pid: ParentPid = None,
) -> None:
    """Serve a model over the OpenAI API."""
    _become_server(parent_pid)
    from folovllm.engine.arg_utils import EngineArgs
    from folovllm.entrypoints.openai.api_server import run_server
    from folovllm.errors import FoloVLLMError

    with _one_line_errors(FoloVLLMError):
        args = EngineArgs.from_options(
            _given(
                model=model,
                served_model_name=served_model_name,
                device=device,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=block_size,
                num_kv_blocks=num_kv_blocks,
                kv_cache_memory_gb=kv_cache_memory_gb,
                enable_prefix_caching=enable_prefix_caching,
                attention_backend=attention_backend,
                seed=seed,
                num_threads=num_threads,
                kv_transfer_config=_json_option("--kv-transfer-config", kv_transfer_config),
                kv_events_config=_json_option("--kv-events-config", kv_events_config),
            )
        )
        run_server(args, host, port, api_key=api_key, ready_callback=_ready_callback(ready_fd))


@app.command()
def route(
    pod: Annotated[
        list[str] | None,
        _option(
            "An engine: name=http://host:port, or a JSON object with name, url, eventsEndpoint, replayEndpoint, model.",
            metavar="POD",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 9000,
    model: Annotated[str | None, _option("Name of the model that --tokenizer belongs to.")] = None,
    tokenizer: Annotated[str | None, _option("Checkpoint directory or hub id with the model's tokenizer.")] = None,
    policy: Annotated[str | None, _option("kv_aware or round_robin.")] = None,
    block_size: Annotated[int | None, _option("Tokens per block key; best the engines' own.")] = None,
    config: Annotated[Path | None, _option("JSON or YAML document with every option; flags win.")] = None,
    ready_fd: ReadyFd = None,
    parent_pid: ParentPid = None,
) -> None:
    """Route OpenAI requests to the engine that has their prefix cached."""
    _become_server(parent_pid)
    from kvrouter.config import RouterConfig, load_config, parse_pod
    from kvrouter.errors import KVRouterError
    from kvrouter.proxy.serve import run_router

    with _one_line_errors(KVRouterError):
        options = load_config(config) if config else RouterConfig()
        changes: list[tuple[str, Any]] = [
            ("proxy_config.policy", policy),
            ("token_processor_config.block_size", block_size),
            ("pods", (*options.pods, *map(parse_pod, pod)) if pod else None),
            (
                "tokenizers_pool_config.local.model_tokenizer_map",
                {model or tokenizer: tokenizer} if tokenizer else None,
            ),
        ]
        for path, value in changes:
            if value is not None:
                options = _replace_nested(options, path.split("."), value)
        run_router(options, host, port, on_ready=_ready_callback(ready_fd))


@app.command()
def demo(
    model: Annotated[str | None, _option("Checkpoint directory or hub id instead of the demo's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to FILE.", metavar="FILE")] = None,
    keep: Annotated[bool, _option("Leave the endpoint running afterwards.")] = False,
    port: Annotated[int, typer.Option(help="Port of the endpoint; 0 takes a free one.")] = 0,
    users: Annotated[int, typer.Option(min=1, help="Concurrent conversations.")] = 12,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each conversation.")] = 4,
) -> None:
    """Serve one multi-turn workload three ways, and compare."""
    import aiohttp
    from rich.console import Console

    from kvstrata.demo import DemoOptions, run_demo
    from kvstrata.errors import KVStrataError
    from kvstrata.workload import WorkloadSpec

    options = DemoOptions(
        model=model,
        workload=WorkloadSpec(num_users=users, num_turns=turns),
        port=port,
        keep=keep,
        json_file=json_file,
    )
    with _one_line_errors(KVStrataError, aiohttp.ClientError, OSError):
        run_demo(options, Console())


def main() -> NoReturn:
    """Entry point of the `kvstrata` script; Ctrl-C ends with status 130 and no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _become_server(parent_pid: int | None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if parent_pid is not None:
        lifeline.exit_with_parent(parent_pid)


def _ready_callback(ready_fd: int | None) -> Callable[[int], None]:
    return lambda port: lifeline.announce_ready(ready_fd, port) if ready_fd is not None else None


def _replace_nested(config: Any, path: list[str], value: Any) -> Any:
    """A frozen config with one option changed, however deep it lies."""
    head, *rest = path
    return replace(config, **{head: _replace_nested(getattr(config, head), rest, value) if rest else value})


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _json_option(flag: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{flag} must be a JSON object, not {value!r}")
    return value


@contextmanager
def _one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """Errors that blame the user or the environment end the command with one line, not with a traceback."""
    try:
        yield
    except expected as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_USAGE) from error
