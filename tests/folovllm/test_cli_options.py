"""Option dataclasses on the command line."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.cli import app as folovllm_app
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.options import GivenFields, with_options
from folovllm.errors import ConfigError
from folovllm.sampling_params import SamplingParams
from kvstrata.cli import app as kvstrata_app


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str
    """What to load."""
    size: int = 3
    """How large."""
    color: Literal["red", "blue"] = "red"
    ratio: float | None = None
    fast: bool = True
    file: Path | None = None
    extra: dict[str, Any] | None = None
    token: str | None = field(default=None, metadata={"envvar": ("TOKEN_OF_TESTS",)})

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"size={self.size} is not allowed")


taken: list[Any] = []
app = typer.Typer()


@app.command()
@with_options(positional=("model",))
def build(options: Options, port: int = 5) -> None:
    """Build it."""
    taken.append((options, port))


@app.command()
@with_options()
def sample(given: Annotated[dict[str, Any], GivenFields(SamplingParams, without=("seed",))]) -> None:
    """Sample it."""
    taken.append(given)


def call(*args: str, code: int = 0, env: dict[str, str] | None = None, of: typer.Typer = app) -> str:
    taken.clear()
    result = CliRunner().invoke(of, list(args), env={"COLUMNS": "250", "TERM": "dumb", **(env or {})})
    assert result.exit_code == code, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_what_is_left_out_takes_the_declared_default() -> None:
    call("build", "m")
    assert taken == [(Options(model="m"), 5)]


def test_every_kind_of_field_is_read() -> None:
    call(
        "build", "m", "--size", "7", "--color", "blue", "--ratio", "0.5", "--no-fast", "--file", "x/y",
        "--extra", '{"a": 1}', "--port", "9", env={"TOKEN_OF_TESTS": "t"},
    )  # fmt: skip
    expected = Options(
        model="m", size=7, color="blue", ratio=0.5, fast=False, file=Path("x/y"), extra={"a": 1}, token="t"
    )
    assert taken == [(expected, 9)]
    call("build", "m", "--token", "flag", env={"TOKEN_OF_TESTS": "t"})
    assert taken[0][0].token == "flag"
    assert "[red|blue]" in call("build", "--help")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ((), "MODEL"),
        (("m", "--extra", "{"), "--extra is not JSON"),
        (("m", "--extra", "[]"), "--extra must be a JSON object"),
        (("m", "--size", "-1"), "size=-1 is not allowed"),
        (("m", "--sice", "1"), "--sice"),
    ],
)
def test_bad_options_are_usage_errors(args: tuple[str, ...], complaint: str) -> None:
    assert complaint.lower() in call("build", *args, code=2).lower()


def test_sampling_options_are_only_those_given() -> None:
    call("sample")
    assert taken == [{}]
    call("sample", "--temperature", "0", "--stop", "a", "--stop", "b", "--structured-outputs", '{"regex": "x"}')
    assert taken == [{"temperature": 0.0, "stop": ["a", "b"], "structured_outputs": {"regex": "x"}}]
    assert SamplingParams.from_options(taken[0]).stop == ("a", "b")
    assert "--seed" not in call("sample", "--help")


@pytest.mark.parametrize("program", [folovllm_app, kvstrata_app])
def test_serve_has_every_option_of_engine_and_server(program: typer.Typer) -> None:
    text = call("serve", "--help", of=program)
    for declared in (*fields(EngineArgs), *fields(ServerOptions)):
        assert declared.name == "model" or f"--{declared.name.replace('_', '-')}" in text
    assert "FOLOVLLM_API_KEY" in text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"port": 70000}, "port=70000"),
        ({"drain_timeout": -1}, "drain_timeout=-1"),
        ({"api_key": " "}, "api_key is empty"),
        ({"tool_call_parser": "xml"}, "auto, none, hermes"),
    ],
)
def test_bad_server_options_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ServerOptions(**options).check()


def test_api_key_is_not_printed() -> None:
    assert "secret" not in repr(ServerOptions(api_key="secret"))
