"""Option dataclasses as command line options, so that each option is declared once, where it belongs.

    @app.command()
    @with_options(positional=("model",))              serve MODEL --max-num-seqs N --host H ...
    def serve(engine: EngineArgs, server: ServerOptions) -> None: ...

An option left out takes the declared default. A field's docstring is its help. Mirrors vllm/engine/arg_utils.py.
"""

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import msgspec
import typer

from folovllm.errors import ConfigError

_SCALARS = (str, int, float, bool, Path)
_MISSING = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True, slots=True)
class GivenFields:
    """Marks a parameter that takes the given ones of the fields of `kind`: `Annotated[dict, GivenFields(K)]`."""

    kind: type
    without: tuple[str, ...] = ()
    """Fields that are no options here."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    type: Any
    default: Any
    help: str
    envvar: tuple[str, ...] | None


def with_options(*, positional: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace each parameter whose type declares options by one command line option per field.

    That is a dataclass (built by its `from_options` when it has one), or `GivenFields`. Fields named in `positional`
    become arguments.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, tuple[Any, list[_Field]]] = {}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            fields = _fields(parameter.annotation)
            if fields is None:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            groups[parameter.name] = parameter.annotation, fields
            parameters += [_parameter(field, field.name in positional) for field in fields]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            built = {name: _build(kind, fields, values) for name, (kind, fields) in groups.items()}
            function(**built, **values)

        # typer reads the one or the other.
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _fields(annotation: Any) -> list[_Field] | None:
    """The options that a parameter of this type declares; None when it is an ordinary parameter."""
    for given in getattr(annotation, "__metadata__", ()):
        if isinstance(given, GivenFields):
            return [field for field in _declared(given.kind) if field.name not in given.without]
    return _declared(annotation) if dataclasses.is_dataclass(annotation) else None


def _declared(kind: Any) -> list[_Field]:
    helps = _docstrings(kind)
    if issubclass(kind, msgspec.Struct):
        return [
            _Field(f.name, f.type, _MISSING if f.required else f.default, helps.get(f.name, ""), None)
            for f in msgspec.structs.fields(kind)
        ]
    return [
        _Field(
            f.name,
            f.type,
            _MISSING if f.default is dataclasses.MISSING else f.default,
            helps.get(f.name, ""),
            f.metadata.get("envvar"),
        )
        for f in dataclasses.fields(kind)
    ]


def _parameter(field: _Field, is_argument: bool) -> inspect.Parameter:
    required = field.default is _MISSING
    annotation = _annotation(field.type)
    if is_argument:
        info: Any = typer.Argument(help=field.help, show_default=False, metavar=field.name.upper())
    else:
        shown = False if required or field.default in (None, ()) else str(field.default)
        info = typer.Option(
            help=field.help, show_default=shown, envvar=cast(Any, field.envvar), metavar=_choices(field.type)
        )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=_MISSING if required else None,
        annotation=Annotated[annotation if required else annotation | None, info],
    )


def _build(kind: Any, fields: list[_Field], values: dict[str, Any]) -> Any:
    """What the parameter gets; its fields are taken out of `values`."""
    given = {}
    for field in fields:
        value = values.pop(field.name)
        if value is not None and value != []:
            given[field.name] = _from_json(field.name, value) if _is_json(field.type) else value
    if not dataclasses.is_dataclass(kind):
        return given
    make: Callable[[Mapping[str, Any]], Any] | None = getattr(kind, "from_options", None)
    try:
        return make(given) if make is not None else cast(type, kind)(**given)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, None apart."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [member for member in members if member is not type(None)]


def _annotation(kind: Any) -> Any:
    """What typer reads: a scalar, a list of scalars given one by one, or JSON text for all else.

    Choices are read as text: their dataclass knows them, and refuses others by name.
    """
    first, *others = _alternatives(kind)
    if not others and first in _SCALARS:
        return first
    if _choices(kind) is not None:
        return str
    if not others and get_origin(first) is tuple and get_args(first)[0] in _SCALARS:
        return list[get_args(first)[0]]  # type: ignore[misc]
    return str


def _is_json(kind: Any) -> bool:
    return _annotation(kind) is str and _alternatives(kind) != [str] and _choices(kind) is None


def _choices(kind: Any) -> str | None:
    """The values of a Literal, as help shows them; None for other types."""
    first = _alternatives(kind)[0]
    return f"[{'|'.join(get_args(first))}]" if get_origin(first) is Literal else None


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
    "enable_prefix_caching": "Reuse the KV of shared prefixes.",
    "enable_chunked_prefill": "Compute long prompts in several steps.",
    "attention_backend": "Force one of the attention implementations.",
    "seed": "Seed of the requests that bring none.",
    "skip_tokenizer_init": "Take and give token ids only.",
    "kv_transfer_config": "KV connector, as JSON.",
    "kv_events_config": "KV event publisher, as JSON.",
    "ignore_eos": "Go on after an end-of-sequence token.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "include_stop_str_in_output": "Keep the stop string in the text.",
    "structured_outputs": 'What the text must look like, as JSON: {"json": schema}, {"regex": ...}, ...',
}
