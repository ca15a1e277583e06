"""The command line: `kvstrata serve | route | demo | quantize`. Options are parsed here, once; the work is done
elsewhere.

An option left out takes the default declared where it belongs (`EngineArgs`, `RouterConfig`, ...).
Each command imports what it needs when it runs, so that `route` loads no engine, and of `serve` only the engine core,
a process of its own, loads torch.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.options import with_options
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
@with_options(positional=("model",))
def serve(engine: EngineArgs, server: ServerOptions, ready_fd: ReadyFd = None, parent_pid: ParentPid = None) -> None:
    """Serve a model over the OpenAI API."""
    _become_server(parent_pid)
    from folovllm.entrypoints.openai.api_server import run_server
    from folovllm.errors import FoloVLLMError

    with _one_line_errors(FoloVLLMError):
        run_server(engine, server, ready_callback=_ready_callback(ready_fd))


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


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face hub id.")],
    out: Annotated[Path, typer.Argument(help="Where to write; must not exist, or be empty.")],
    calibration: Annotated[Path, typer.Option(help="UTF-8 text; its last tenth measures the perplexity.")],
    bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    head_bits: Annotated[int, typer.Option(help="Of the output head: 4, 8, or 16, which leaves it as it is.")] = 16,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or -1 for all.")] = 128,
    sym: Annotated[bool, typer.Option(help="Zero points in the middle, rather than one per group.")] = True,
    desc_act: Annotated[bool, typer.Option(help="Round the inputs with the largest activations first.")] = False,
    num_windows: Annotated[int, typer.Option(help="Pieces of the text to quantise by.")] = 128,
    window_tokens: Annotated[int, typer.Option(help="Their length.")] = 512,
) -> None:
    """Quantise a checkpoint's linear layers, and its output head if asked, with GPTQ, and compare perplexities."""
    from rich.console import Console

    from folovllm.engine.arg_utils import resolve_checkpoint
    from folovllm.errors import FoloVLLMError
    from kvstrata.quantize import run_quantize

    with _one_line_errors(FoloVLLMError):
        run_quantize(
            resolve_checkpoint(model),
            out,
            bits=bits,
            head_bits=head_bits,
            group_size=group_size,
            calibration=calibration,
            sym=sym,
            desc_act=desc_act,
            num_windows=num_windows,
            window_tokens=window_tokens,
            console=Console(),
        )


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


@contextmanager
def _one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """Errors that blame the user or the environment end the command with one line, not with a traceback."""
    try:
        yield
    except expected as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_USAGE) from error
