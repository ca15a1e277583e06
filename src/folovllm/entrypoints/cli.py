"""The command line: `folovllm serve | run | bench`. Options are the fields of option dataclasses; see `options`.

Each command imports what it needs when it runs, so that of `serve` only the engine core, a process of its own, loads
torch. Mirrors vllm/entrypoints/cli/main.py.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.bench.options import LatencyOptions, ServeOptions, ThroughputOptions
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.options import GivenFields, with_options
from folovllm.entrypoints.run import RunOptions
from folovllm.errors import FoloVLLMError
from folovllm.sampling_params import SamplingParams

EXIT_BAD_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(help="A compact LLM engine aligned with vLLM.", no_args_is_help=True, pretty_exceptions_enable=False)
bench = typer.Typer(help="Measure the engine, or a server that speaks OpenAI's API.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@app.command()
@with_options(positional=("model",))
def serve(engine: EngineArgs, server: ServerOptions) -> None:
    """Serve a model over the OpenAI API."""
    from folovllm.entrypoints.openai.api_server import run_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _one_line_errors():
        run_server(engine, server)


@app.command()
@with_options()
def run(
    engine: EngineArgs,
    what: RunOptions,
    sampling: Annotated[dict[str, Any], GivenFields(SamplingParams, without=("seed",))],
) -> None:
    """Complete one prompt, or a file of prompts."""
    from folovllm.entrypoints.run import run_offline

    with _one_line_errors():
        run_offline(engine, what, sampling)


@bench.command()
@with_options()
def latency(engine: EngineArgs, options: LatencyOptions) -> None:
    """How long one batch takes, from its prompts to its last token."""
    from folovllm.entrypoints.bench.offline import bench_latency

    with _one_line_errors():
        bench_latency(engine, options)


@bench.command()
@with_options()
def throughput(engine: EngineArgs, options: ThroughputOptions) -> None:
    """How many tokens a second the engine makes of many prompts at once."""
    from folovllm.entrypoints.bench.offline import bench_throughput

    with _one_line_errors():
        bench_throughput(engine, options)


@bench.command(name="serve")
@with_options()
def bench_serve(options: ServeOptions) -> None:
    """Send requests to a running server at a rate, and measure what a client sees."""
    from folovllm.entrypoints.bench.serve import run_serve_bench

    with _one_line_errors():
        run_serve_bench(options)


def main() -> NoReturn:
    """Entry point of the `folovllm` script; Ctrl-C ends with status 130 and no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that blame the user or the environment end the command with one line, not with a traceback."""
    try:
        yield
    except (FoloVLLMError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_USAGE) from error
