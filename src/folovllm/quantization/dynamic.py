"""Rules that give single modules of a GPTQ checkpoint settings of their own: the option `dynamic`.

    "dynamic": {
        "+:model\\.layers\\.0\\..*": {"bits": 8, "group_size": 32},    settings that differ from the checkpoint's
        "lm_head": {"bits": 8},                                   "+:" is what no prefix means
        "-:.*\\.down_proj": {}                                   excluded: not quantised
    }

A key is a regular expression that must match a module's name from its beginning on; of several, the first holds, alone.
Source: GPTQModel's quantize_config.json.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from folovllm.errors import ModelLoadError

_QUANTIZER_ONLY = frozenset(
    (
        "act_group_aware",
        "damp_auto_increment",
        "damp_percent",
        "gptaq",
        "gptaq_alpha",
        "hyb_act",
        "mse",
        "static_groups",
        "true_sequential",
        "v2",
        "v2_alpha",
    )
)
"""How the integers were found; what they stand for does not depend on it."""


@dataclass(frozen=True, slots=True)
class DynamicRule:
    """One entry of `dynamic`."""

    pattern: re.Pattern[str]
    overrides: Mapping[str, Any] | None
    """Setting -> value; None: modules that match are not quantised."""


def parse_dynamic(options: Any, allowed: Mapping[str, tuple[Any, ...]]) -> tuple[DynamicRule, ...]:
    """Read and check the option's value, in its order; `allowed`: setting -> the values it can have.

    Raises:
        ModelLoadError: it has another form, a pattern is no regular expression, a setting is unknown, or its value is
            not allowed; it is named.
    """
    if options is None:
        return ()
    if not isinstance(options, Mapping):
        raise ModelLoadError(f"GPTQ option dynamic must map patterns to settings, not be {options!r}")
    return tuple(_parse_rule(key, settings, allowed) for key, settings in options.items())


def find_rule(rules: Iterable[DynamicRule], module: str) -> DynamicRule | None:
    """The first rule that matches."""
    return next((rule for rule in rules if rule.pattern.match(module)), None)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """The allowed value that equals `value`.

    Raises:
        ModelLoadError: there is none.
    """
    if value not in allowed:
        raise ModelLoadError(
            f"GPTQ option {name}={value!r} is not supported; supported: {', '.join(map(str, allowed))}"
        )
    return allowed[allowed.index(value)]


def _parse_rule(key: Any, settings: Any, allowed: Mapping[str, tuple[Any, ...]]) -> DynamicRule:
    if not isinstance(key, str) or not isinstance(settings, Mapping | None):
        raise ModelLoadError(f"GPTQ option dynamic has {key!r}: {settings!r}; it must map a pattern to settings")
    try:
        pattern = re.compile(key[2:] if key.startswith(("-:", "+:")) else key)
    except re.error as error:
        raise ModelLoadError(f"GPTQ option dynamic has {key!r}, which is no regular expression: {error}") from error
    if key.startswith("-:"):
        return DynamicRule(pattern, None)
    overrides = {}
    for name, value in (settings or {}).items():
        if name in allowed:
            overrides[name] = one_of(f"dynamic[{key!r}].{name}", value, allowed[name])
        elif name not in _QUANTIZER_ONLY:
            raise ModelLoadError(
                f"GPTQ option dynamic[{key!r}].{name} is not supported; supported: {', '.join(allowed)}"
            )
    return DynamicRule(pattern, overrides)
