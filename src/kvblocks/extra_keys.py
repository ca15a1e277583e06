"""The extra keys that enter a block hash beside its tokens: LoRA adapters, images, cache salts.

A block's extra keys are a tuple such as `(("lora", "alice", "/adapters/alice"), ("cache_salt", "s3cr3t"))`, or None.
Source: vLLM's `generate_block_hash_extra_keys` and `to_event_extra_keys`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from kvblocks.errors import InvalidHashInputError

KeyValue: TypeAlias = "bool | int | str | bytes | tuple[KeyValue, ...] | None"
"""What an extra key may hold, after `normalise` turned lists into tuples."""

MAX_DEPTH: Final = 8
"""How deep the tuples of an extra key may nest; vLLM's go two deep."""

ExtraKeys: TypeAlias = "Sequence[Sequence[object] | None]"
"""One entry per full block: None, or the extra keys of that block."""


def build_extra_keys(
    num_blocks: int, *, lora: tuple[str, str] | None = None, cache_salt: str | None = None
) -> list[tuple[tuple[str, ...], ...] | None] | None:
    """Return the extra keys of the first `num_blocks` blocks of a prompt, or None when there are none.

    `lora` is the adapter's (name, path) and enters every block; `cache_salt` enters block 0 alone, from where the chain
    carries it to all others.
    """
    if lora is None and not cache_salt:
        return None
    every_block: tuple[tuple[str, ...], ...] = (("lora", *lora),) if lora is not None else ()
    keys: list[tuple[tuple[str, ...], ...] | None] = [every_block or None] * num_blocks
    if cache_salt and num_blocks:
        keys[0] = (*every_block, ("cache_salt", cache_salt))
    return keys


def untag_extra_keys(
    extra_keys: Iterable[Sequence[Sequence[object]] | None] | None,
) -> list[tuple[object, ...] | None] | None:
    """Return extra keys in the form events publish them: without their tags and without the path of a LoRA adapter.

    `("mm", id, offset)` becomes `(id, offset)`; every other key `(tag, value, ...)` becomes `value`.
    """
    if extra_keys is None:
        return None
    published = [
        None if keys is None else tuple(tuple(key[1:]) if key[0] == "mm" else key[1] for key in keys)
        for keys in extra_keys
    ]
    return published or None


def normalise(value: object, where: str = "extra_keys", max_depth: int = MAX_DEPTH) -> KeyValue:
    """Return `value` with lists turned into tuples, at every depth.

    Raises:
        InvalidHashInputError: a type that cannot enter a block hash, or nesting beyond `max_depth`.
    """
    kind = type(value)
    if isinstance(value, (tuple, list)):
        if not max_depth:
            raise InvalidHashInputError(f"{where} is nested deeper than the {MAX_DEPTH} levels allowed")
        return tuple(normalise(item, f"{where}[{i}]", max_depth - 1) for i, item in enumerate(value))
    if value is None or kind in (bool, int, str, bytes):
        return value  # type: ignore[return-value]
    raise InvalidHashInputError(
        f"{where} has type {kind.__name__}; allowed are None, bool, int, str, bytes, and tuples or lists of these"
    )


def normalise_per_block(extra_keys: ExtraKeys | None, num_blocks: int) -> list[KeyValue] | None:
    """Check that there is one entry per full block, and normalise each; an empty entry counts as None.

    Returns None when no block has extra keys.

    Raises:
        InvalidHashInputError: wrong number of entries, or an entry that is not a tuple, a list or None.
    """
    if extra_keys is None:
        return None
    if len(extra_keys) != num_blocks:
        raise InvalidHashInputError(
            f"extra_keys has {len(extra_keys)} entries, but the tokens fill {num_blocks} blocks: "
            "give one entry (None or a tuple) per full block"
        )
    keys: list[KeyValue] = []
    for i, entry in enumerate(extra_keys):
        if entry is not None and not isinstance(entry, (tuple, list)):
            raise InvalidHashInputError(f"extra_keys[{i}] has type {type(entry).__name__}; give None or a tuple")
        keys.append(normalise(entry, f"extra_keys[{i}]") or None)
    return keys if any(key is not None for key in keys) else None


def encode_cbor(value: KeyValue) -> bytes:
    """Encode a normalised value as canonical CBOR (shortest heads, definite lengths).

    Source: RFC 8949, section 4.2.1.
    """
    out = bytearray()
    _append_cbor(out, value)
    return bytes(out)


# Major types, in the top three bits of a head byte.
_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _TAG = 0x00, 0x20, 0x40, 0x60, 0x80, 0xC0


def _append_cbor(out: bytearray, value: KeyValue) -> None:
    if value is None:
        out.append(0xF6)
    elif value is True or value is False:
        out.append(0xF5 if value else 0xF4)
    elif isinstance(value, int):
        _append_int(out, value)
    elif isinstance(value, bytes):
        _append_head(out, _BYTES, len(value))
        out += value
    elif isinstance(value, str):
        try:
            text = value.encode()
        except UnicodeEncodeError as error:
            raise InvalidHashInputError(f"extra key {value!r} is not valid Unicode text: {error.reason}") from error
        _append_head(out, _TEXT, len(text))
        out += text
    else:
        _append_head(out, _ARRAY, len(value))
        for item in value:
            _append_cbor(out, item)


def _append_int(out: bytearray, value: int) -> None:
    magnitude = value if value >= 0 else -1 - value
    if magnitude < 1 << 64:
        _append_head(out, _UNSIGNED if value >= 0 else _NEGATIVE, magnitude)
        return
    # Integers beyond 64 bits are byte strings under tag 2 (positive) or 3 (negative).
    _append_head(out, _TAG, 2 if value >= 0 else 3)
    digits = magnitude.to_bytes((magnitude.bit_length() + 7) // 8, "big")
    _append_head(out, _BYTES, len(digits))
    out += digits


def _append_head(out: bytearray, major: int, argument: int) -> None:
    if argument < 24:
        out.append(major | argument)
    elif argument < 1 << 8:
        out += struct.pack(">BB", major | 24, argument)
    elif argument < 1 << 16:
        out += struct.pack(">BH", major | 25, argument)
    elif argument < 1 << 32:
        out += struct.pack(">BI", major | 26, argument)
    else:
        out += struct.pack(">BQ", major | 27, argument)
