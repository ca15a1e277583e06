"""Random JSON schemas whose instances are bounded, so that any model comes to their end."""

import random
from typing import Any

_WORDS = ("red", "größe", "a b", 'quo"te', "東京", "", "x/y", "tab\t")


def random_schema(dice: random.Random, depth: int = 2) -> dict[str, Any]:
    """One schema, nested up to `depth` levels."""
    kinds = [_string, _integer, _number, _boolean, _enum, _constant]
    if depth > 0:
        kinds += [_object, _object, _object, _array, _array, _any_of]
    return dice.choice(kinds)(dice, depth)


def random_object(dice: random.Random) -> dict[str, Any]:
    """A schema as applications have: an object at the top."""
    return _object(dice, 2)


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(["id", "name", "tags", "größe", "a b", "nested"], k=dice.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(dice, depth - 1) for name in names},
        "required": [name for name in names if dice.random() < 0.7],
        "additionalProperties": False,
    }


def _array(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(dice, depth - 1),
        "minItems": least,
        "maxItems": least + dice.randint(0, 2),
    }


def _any_of(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(dice, depth - 1) for _ in range(dice.randint(2, 3))]}


def _string(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randint(0, 3)
    shape = dice.choice(
        [{}, {"minLength": least}, {"pattern": "^[a-f]{2,4}(-[0-9]{1,2})?$"}, {"format": "date"}, {"format": "uuid"}]
    )
    bound = {} if "pattern" in shape or "format" in shape else {"maxLength": least + dice.randint(0, 6)}
    return {"type": "string", **shape, **bound}


def _integer(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randint(-500, 500)
    step = dice.choice([{}, {"multipleOf": dice.randint(2, 7)}])
    return {"type": "integer", "minimum": least, "maximum": least + dice.randint(7, 10_000), **step}


def _number(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randint(-50, 50)
    step = dice.choice([0.5, 0.25])  # else it may have digits without end
    return {"type": "number", "minimum": least, "maximum": least + dice.randint(1, 100), "multipleOf": step}


def _boolean(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"type": dice.choice(["boolean", "null", ["boolean", "null"]])}


def _enum(dice: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = [*_WORDS, 0, -1.5, True, None, [1, "two"], {"k": []}]
    return {"enum": dice.sample(values, k=dice.randint(1, 5))}


def _constant(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"const": dice.choice(_WORDS)}
