"""Documents (dict, JSON, YAML) -> frozen dataclasses: every key known, every value checked, every error named.

A dataclass field `block_size` is the key `blockSize` (`block_size` is read too). The field's
type says how its value is read: bool, int, float, str, `Seconds`, a dataclass, `tuple[X, ...]`, `dict[str, X]`, or any
of these `| None`; `Allow` bounds it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, TypeVar

from kvrouter.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Allow:
    """Which values of its type an option may have: `Annotated[int, Allow(at_least=1)]`."""

    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] | None = None
    is_duration: bool = False

    def check(self, value: Any, where: str) -> None:
        """Raise `ConfigError` for a value that is not allowed; None always is."""
        if value is None:
            return
        if self.at_least is not None and not value >= self.at_least:
            raise ConfigError(f"{where} is at least {self.at_least}, not {_show(value)}")
        if self.at_most is not None and not value <= self.at_most:
            raise ConfigError(f"{where} is at most {self.at_most}, not {_show(value)}")
        if self.choices is not None and value not in self.choices:
            raise ConfigError(f"{where} is one of {', '.join(self.choices)}, not {_show(value)}")


Seconds = Annotated[float, Allow(at_least=0, is_duration=True)]
"""A duration; documents write it as a number of seconds or as "1m30s"."""
PositiveSeconds = Annotated[float, Allow(at_least=1e-3, is_duration=True)]
"""A duration of at least a millisecond."""

_T = TypeVar("_T")
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|us|µs|ns|h|m|s)")


def parse_config(cls: type[_T], document: object, where: str = "") -> _T:
    """Read `document` as `cls`; keys that are absent keep their defaults.

    Args:
        cls: a dataclass as described above.
        document: a mapping; None stands for an empty one.
        where: path of the document inside the whole, for messages.

    Raises:
        ConfigError: an unknown key (names the nearest allowed one), a missing key, or a value that is not allowed.
    """
    if document is None:
        document = {}
    if not isinstance(document, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is a mapping, not {_show(document)}")
    hints = _type_hints(typing.cast(Hashable, cls))
    fields = {camel_case(field.name): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in document.items():
        name = camel_case(key) if isinstance(key, str) else key
        if name not in fields:
            raise ConfigError(_unknown_key(key, list(fields), where))
        if name in given:
            raise ConfigError(f"{name} is given twice{f' in {where}' if where else ''}")
        given[name] = value
    values: dict[str, Any] = {}
    for key, field in fields.items():
        path = f"{where}.{key}" if where else key
        if key in given:
            values[field.name] = _parse_value(hints[field.name], given[key], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path} is required")
    return cls(**values)


def check_options(config: Any) -> None:
    """Check the fields of a config dataclass against their `Allow`; call it in `__post_init__`.

    Raises:
        ConfigError: a value that is not allowed.
    """
    for name, hint in _type_hints(config.__class__).items():
        for allowed in getattr(hint, "__metadata__", ()):
            allowed.check(getattr(config, name), camel_case(name))


def camel_case(name: str) -> str:
    """`block_size` -> `blockSize`; what is in camel case already stays."""
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)


def parse_duration(value: object, where: str = "duration") -> float:
    """Read a number of seconds, or text such as "1m0s", "250ms", "1h30m".

    Raises:
        ConfigError: anything else, or a negative or infinite duration.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    if isinstance(value, str):
        text = value.strip()
        parts = _DURATION.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            return sum(float(number) * _UNIT_S[unit] for number, unit in parts)
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text)
    raise ConfigError(f'{where} is a duration such as 1.5 (seconds), "250ms" or "1m0s", not {_show(value)}')


def _parse_value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        inner, allowed = arguments
        parsed = parse_duration(value, where) if allowed.is_duration else _parse_value(inner, value, where)
        allowed.check(parsed, where)
        return parsed
    if origin in (types.UnionType, typing.Union):
        kinds = [argument for argument in arguments if argument is not type(None)]
        assert len(kinds) == 1, "a config field is of one type, or of one type or None"
        return None if value is None else _parse_value(kinds[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is a list, not {_show(value)}")
        return tuple(_parse_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        return _parse_map(arguments[1], value, where)
    if dataclasses.is_dataclass(hint):
        return parse_config(typing.cast(type, hint), value, where)
    return _parse_scalar(hint, value, where)


def _parse_map(hint: Any, value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} is a mapping with text keys, not {_show(value)}")
    return {key: _parse_value(hint, item, f"{where}.{key}") for key, item in value.items()}


def _parse_scalar(hint: Any, value: object, where: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(typing.cast(float, value))
    if hint is int and is_number and float(typing.cast(float, value)).is_integer():
        return int(typing.cast(float, value))  # JSON and YAML writers may say 1e8
    if hint in (bool, str) and type(value) is hint:
        return value
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise ConfigError(f"{where} is {name}, not {_show(value)}")


@functools.cache
def _type_hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _unknown_key(key: object, allowed: list[str], where: str) -> str:
    near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
    place = f" in {where}" if where else ""
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return f"unknown key {key!r}{place}{hint}; allowed are {', '.join(allowed)}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
