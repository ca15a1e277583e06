"""Frozen option dataclasses as command line options, so that each option is declared once, where it belongs.

    @app.command()
    @with_options(positional=("model",))              serve MODEL --max-num-seqs N --host H ...
    def serve(engine: EngineArgs, server: ServerOptions) -> None: ...

An option left out takes the dataclass's default. A field's docstring is its help. Mirrors vllm/engine/arg_utils.py.
"""

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer

from folovllm.errors import ConfigError

_SCALARS = (str, int, float, bool)


def with_options(*, positional: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace each parameter whose type is an option dataclass by one command line option per field.

    Fields named in `positional` become arguments. A dataclass with a `from_options` is built by it.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, type] = {}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if dataclasses.is_dataclass(parameter.annotation):
                groups[parameter.name] = cast(type, parameter.annotation)
                parameters += _parameters(parameter.annotation, positional)
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def command(**values: Any) -> None:
            built = {name: _build(kind, values) for name, kind in groups.items()}
            function(**built, **values)

        # typer reads the one or the other.
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameters(kind: Any, positional: tuple[str, ...]) -> list[inspect.Parameter]:
    helps = _docstrings(kind)
    found = []
    for field in dataclasses.fields(kind):
        text, required = helps.get(field.name, ""), field.default is dataclasses.MISSING
        annotation = _annotation(field.type)
        if field.name in positional:
            info: Any = typer.Argument(help=text, show_default=False)
        else:
            shown = False if required or field.default is None else str(field.default)
            environment = field.metadata.get("envvar")
            info = typer.Option(help=text, show_default=shown, envvar=environment, show_envvar=True)
        default = inspect.Parameter.empty if required else None
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[annotation if required else annotation | None, info],
            )
        )
    return found


def _build(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass of what was given; its fields are taken out of `values`."""
    given = {}
    for field in dataclasses.fields(kind):
        value = values.pop(field.name)
        if value is not None:
            given[field.name] = _from_json(field.name, value) if _is_json(field.type) else value
    make: Callable[[dict[str, Any]], Any] | None = getattr(kind, "from_options", None)
    try:
        return make(given) if make is not None else kind(**given)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, None apart."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [member for member in members if member is not type(None)]


def _is_json(kind: Any) -> bool:
    alternatives = _alternatives(kind)
    return not (len(alternatives) == 1 and (alternatives[0] in _SCALARS or get_origin(alternatives[0]) is Literal))


def _annotation(kind: Any) -> Any:
    return str if _is_json(kind) else _alternatives(kind)[0]


def _from_json(name: str, text: str) -> dict[str, Any]:
    flag = f"--{name.replace('_', '-')}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{flag} must be a JSON object, not {value!r}")
    return value


def _docstrings(kind: type) -> dict[str, str]:
    """Field name -> the string that stands below it in the source."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = dict(_SHORT_HELPS)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            target = cast(ast.Name, cast(ast.AnnAssign, field).target)
            found[target.id] = inspect.cleandoc(str(below.value.value))
    return found


# Fields whose names say enough to a reader of the source.
_SHORT_HELPS = {
    "served_model_name": "Name of the model in the API.",
    "device": "Where the model runs.",
    "dtype": "Type of weights and KV cache; auto takes the checkpoint's.",
    "block_size": "Tokens of one KV block.",
    "kv_cache_memory_gb": "Size of the device's KV pool instead.",
    "enable_prefix_caching": "Reuse the KV of shared prefixes.",
    "enable_chunked_prefill": "Compute long prompts in several steps.",
    "attention_backend": "Force one of the attention implementations.",
    "seed": "Seed of the requests that bring none.",
    "skip_tokenizer_init": "Serve token ids only.",
    "kv_transfer_config": "KV connector, as JSON.",
    "kv_events_config": "KV event publisher, as JSON.",
}
