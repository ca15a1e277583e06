"""The events that announce KV blocks, and their two wire layouts.

A batch is a msgpack array `[ts, [event, ...], data_parallel_rank]`. Its events are, by the engine that speaks:

    map     {"type": "BlockStored", "block_hashes": [...], ...}             vLLM now; what we publish
    array   ["BlockStored", block_hashes, parent_block_hash, token_ids, ...]    earlier vLLM, SGLang

Decoding accepts both, mixed in one batch too, and tolerates fields it does not know and tail fields that are missing.
Source: vLLM's `vllm/distributed/kv_events.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from kvblocks.errors import KVBlocksError, MalformedBatchError

MEDIUM_GPU: Final = "GPU"
MEDIUM_CPU: Final = "CPU"
MEDIUM_STORAGE: Final = "STORAGE"

ExternalHash: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
"""Low 64 bits of a block's digest; decoding turns bytes and negative integers into this form."""

TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


def _none() -> None:
    return None


class _Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Base of the events: a map tagged by class name, without the fields that hold their default."""


class BlockStored(_Event):
    """Blocks now held in `medium`, consecutive in one sequence.

    `token_ids` may span more blocks than `block_hashes` names (some were stored before), or be empty when the receiver
    already knows the blocks from another medium.
    """

    block_hashes: list[ExternalHash]
    parent_block_hash: ExternalHash | None
    token_ids: list[TokenId]
    block_size: int
    # vLLM always writes the next three. A default made by a factory is not omitted, so neither do we omit them.
    lora_id: int | None = msgspec.field(default_factory=_none)
    medium: str | None = msgspec.field(default_factory=_none)
    lora_name: str | None = msgspec.field(default_factory=_none)
    extra_keys: list[tuple[Any, ...] | None] | None = None
    """One entry per block of `block_hashes`, untagged; see `kvblocks.extra_keys.untag_extra_keys`."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(_Event):
    """Blocks no longer held in `medium`."""

    block_hashes: list[ExternalHash]
    medium: str | None = msgspec.field(default_factory=_none)
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(_Event):
    """The publisher holds no block any more, in any medium."""


KVEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """The events of one engine step, in order; `ts` is in seconds since the epoch."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None


@dataclass(frozen=True, slots=True)
class RejectedEvent:
    """An event of a batch that could not be used: its place in the batch, its class of fault, and why."""

    index: int
    kind: Literal["unknown_type", "malformed"]
    reason: str


Layout: TypeAlias = Literal["map", "array"]


def encode_batch(batch: KVEventBatch, layout: Layout = "map") -> bytes:
    """Encode a batch, its events in `layout`; "map" gives the bytes current vLLM would.

    Raises:
        KVBlocksError: unknown layout.
    """
    if layout == "map":
        return _encoder.encode(batch)
    if layout == "array":
        events = [_event_as_array(event) for event in batch.events]
        return _encoder.encode([batch.ts, events, batch.data_parallel_rank])
    raise KVBlocksError(f"unknown event layout {layout!r}; allowed are 'map' and 'array'")


def decode_batch(payload: bytes | memoryview) -> KVEventBatch:
    """Decode a batch of either layout, leaving out the events that cannot be used.

    Raises:
        MalformedBatchError: the payload is not a batch.
    """
    return decode_batch_lenient(payload)[0]


def decode_batch_lenient(payload: bytes | memoryview) -> tuple[KVEventBatch, list[RejectedEvent]]:
    """Decode a batch of either layout, and say which of its events had to be left out.

    Raises:
        MalformedBatchError: the payload is not a batch.
    """
    batch = _decode_envelope(payload)
    events: list[KVEvent] = []
    rejected: list[RejectedEvent] = []
    for index, raw in enumerate(batch.events):
        try:
            events.append(_decode_event(raw))
        except _UnknownTypeError as error:
            rejected.append(RejectedEvent(index, "unknown_type", str(error)))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            rejected.append(RejectedEvent(index, "malformed", str(error)))
    return KVEventBatch(batch.ts, events, batch.data_parallel_rank), rejected


class _UnknownTypeError(ValueError):
    pass


class _ArrayEnvelope(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _MapEnvelope(msgspec.Struct, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


_TYPES: Final[dict[str, type[KVEvent]]] = {
    "BlockStored": BlockStored,
    "BlockRemoved": BlockRemoved,
    "AllBlocksCleared": AllBlocksCleared,
}
# Fields that an array event always has, not counting the tag; trailing ones after them are left out where None.
_NUM_FIXED_FIELDS: Final[dict[type[KVEvent], int]] = {BlockStored: 7, BlockRemoved: 2, AllBlocksCleared: 0}

_encoder = msgspec.msgpack.Encoder()
_array_envelope_decoder = msgspec.msgpack.Decoder(_ArrayEnvelope)
_map_envelope_decoder = msgspec.msgpack.Decoder(_MapEnvelope)
_map_event_decoder: msgspec.msgpack.Decoder[KVEvent] = msgspec.msgpack.Decoder(KVEvent)


def _event_as_array(event: KVEvent) -> list[Any]:
    fields = list(msgspec.structs.astuple(event))
    while len(fields) > _NUM_FIXED_FIELDS[type(event)] and fields[-1] is None:
        fields.pop()
    return [type(event).__name__, *fields]


def _decode_envelope(payload: bytes | memoryview) -> _ArrayEnvelope | _MapEnvelope:
    try:
        # 0x80-0x8f, 0xde and 0xdf open a msgpack map.
        if payload and (payload[0] & 0xF0 == 0x80 or payload[0] in (0xDE, 0xDF)):
            return _map_envelope_decoder.decode(payload)
        return _array_envelope_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBatchError(
            f"not a KV event batch [ts, [event, ...], data_parallel_rank] ({len(payload)} bytes): {error}"
        ) from error


def _decode_event(raw: msgspec.Raw) -> KVEvent:
    try:
        return _map_event_decoder.decode(raw)  # the common case, in one pass
    except msgspec.ValidationError:
        return _convert_event(msgspec.msgpack.decode(raw))


def _convert_event(value: object) -> KVEvent:
    """Build an event from what msgpack says, for the array layout and for hashes that are bytes or negative."""
    tag, fields = _tag_and_fields(value)
    event_type = _TYPES.get(tag) if isinstance(tag, str) else None
    if event_type is None:
        raise _UnknownTypeError(f"unknown event type {tag!r}; known are {', '.join(_TYPES)}")
    if isinstance(fields, list):
        fields = dict(zip(event_type.__struct_fields__, fields, strict=False))
    hashes = fields.get("block_hashes")
    if isinstance(hashes, list):
        fields["block_hashes"] = [_external(item) for item in hashes]
    if fields.get("parent_block_hash") is not None:
        fields["parent_block_hash"] = _external(fields["parent_block_hash"])
    return msgspec.convert(fields, event_type)


def _tag_and_fields(value: object) -> tuple[object, dict[str, Any] | list[Any]]:
    if isinstance(value, dict):
        return value.pop("type", None), value
    if isinstance(value, list) and value:
        return value[0], value[1:]
    raise ValueError(f"an event is a map or a non-empty array, not {type(value).__name__}")


def _external(value: object) -> object:
    """Bring a hash of the wire to its 64-bit form; what is no hash is left for the validation to name."""
    if isinstance(value, bytes) and value:
        return int.from_bytes(value[-8:], "big")
    if isinstance(value, int) and value < 0:
        return value & (2**64 - 1)  # SGLang writes the same 64 bits as a signed integer
    return value
