from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblocks.errors import KVBlocksError, MalformedBatchError
from kvblocks.events import (
    MEDIUM_CPU,
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    decode_batch,
    decode_batch_lenient,
    encode_batch,
)
from kvblocks.hashing import BlockHasher, external_hash

STREAMS = sorted((Path(__file__).parents[1] / "vectors" / "vllm_kv_events").glob("*.json"))

pack = msgspec.msgpack.encode

hash_strategy = st.integers(0, 2**64 - 1)
optional_text = st.none() | st.text(max_size=5)
stored_strategy = st.builds(
    BlockStored,
    block_hashes=st.lists(hash_strategy, max_size=4),
    parent_block_hash=st.none() | hash_strategy,
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=8),
    block_size=st.integers(1, 64),
    lora_id=st.none() | st.integers(0, 9),
    medium=optional_text,
    lora_name=optional_text,
    extra_keys=st.none() | st.lists(st.none() | st.tuples(st.text(max_size=3)), max_size=3),
    group_idx=st.none() | st.integers(0, 3),
    session_id=optional_text,
)
removed_strategy = st.builds(
    BlockRemoved,
    block_hashes=st.lists(hash_strategy, max_size=4),
    medium=optional_text,
    group_idx=st.none() | st.just(1),
)
batch_strategy = st.builds(
    KVEventBatch,
    ts=st.floats(0, 1e10),
    events=st.lists(stored_strategy | removed_strategy | st.builds(AllBlocksCleared), max_size=4),
    data_parallel_rank=st.none() | st.integers(0, 7),
)


def frames_of(stream: Path) -> list[bytes]:
    return [base64.b64decode(frame[2]) for frame in json.loads(stream.read_text())["frames"]]


@pytest.mark.parametrize("stream", STREAMS, ids=lambda path: path.stem)
def test_every_captured_frame_decodes_and_encodes_to_the_same_bytes(stream: Path) -> None:
    frames = frames_of(stream)
    assert frames
    for payload in frames:
        batch, rejected = decode_batch_lenient(payload)
        assert batch.events
        assert not rejected
        assert encode_batch(batch) == payload
        assert decode_batch(encode_batch(batch, "array")) == batch


@pytest.mark.parametrize("stream", STREAMS, ids=lambda path: path.stem)
def test_captured_hashes_are_those_of_our_hasher(stream: Path) -> None:
    document = json.loads(stream.read_text())
    hasher = BlockHasher(document["algo"], document["seed"], block_size=32)
    known: dict[int, bytes] = {}
    num_stored = 0
    for payload in frames_of(stream):
        for event in decode_batch(payload).events:
            if not isinstance(event, BlockStored):
                continue
            assert event.block_size == hasher.block_size
            # Untagged on the wire; only salts occur in these streams.
            extra = [keys and (("cache_salt", keys[0]),) for keys in event.extra_keys or []]
            parent = None if event.parent_block_hash is None else known[event.parent_block_hash]
            digests = hasher.hash_blocks(event.token_ids, extra, parent)
            assert [external_hash(digest) for digest in digests] == event.block_hashes
            known.update(zip(event.block_hashes, digests, strict=True))
            num_stored += len(digests)
    assert num_stored


@settings(max_examples=80)
@given(batch=batch_strategy, layout=st.sampled_from(["map", "array"]))
def test_batches_survive_the_wire(batch: KVEventBatch, layout: Any) -> None:
    assert decode_batch_lenient(encode_batch(batch, layout)) == (batch, [])


def test_map_layout_bytes() -> None:
    batch = KVEventBatch(1.5, [BlockRemoved([1], MEDIUM_GPU)], 0)
    event = b"\x83" + pack("type") + pack("BlockRemoved") + pack("block_hashes") + b"\x91\x01"
    assert encode_batch(batch) == b"\x93" + pack(1.5) + b"\x91" + event + pack("medium") + pack("GPU") + b"\x00"


def test_array_layout_bytes() -> None:
    stored = BlockStored([7], None, [1, 2], 2, medium=MEDIUM_CPU, group_idx=0)
    batch = KVEventBatch(1.5, [stored, AllBlocksCleared()])
    as_arrays = [["BlockStored", [7], None, [1, 2], 2, None, "CPU", None, None, 0], ["AllBlocksCleared"]]
    assert encode_batch(batch, "array") == pack([1.5, as_arrays, None])


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(KVBlocksError, match="'map' and 'array'"):
        encode_batch(KVEventBatch(0.0, []), "json")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "event",
    [
        ["BlockStored", [5], None, [1, 2], 2],
        ["BlockStored", [5], None, [1, 2], 2, None],
        ["BlockStored", [5], None, [1, 2], 2, None, None, None, None, None, None, None, None, None, None, "new", 7],
        {"type": "BlockStored", "block_hashes": [5], "parent_block_hash": None, "token_ids": [1, 2], "block_size": 2},
        {
            "block_size": 2,
            "new": {"a": 1},
            "token_ids": [1, 2],
            "parent_block_hash": None,
            "block_hashes": [5],
            "type": "BlockStored",
        },
    ],
)
def test_missing_and_unknown_tail_fields_are_tolerated(event: Any) -> None:
    batch, rejected = decode_batch_lenient(pack([1.0, [event]]))
    assert batch == KVEventBatch(1.0, [BlockStored([5], None, [1, 2], 2)])
    assert not rejected


@pytest.mark.parametrize("extra", [[], [0], [0, "more"]])
def test_batch_tail_may_be_missing_or_longer(extra: list[Any]) -> None:
    batch = decode_batch(pack([1.0, [["AllBlocksCleared"]], *extra]))
    assert batch == KVEventBatch(1.0, [AllBlocksCleared()], 0 if extra else None)


def test_batch_may_be_a_map() -> None:
    payload = pack({"ts": 1.0, "events": [{"type": "AllBlocksCleared"}], "new": 1})
    assert decode_batch(payload) == KVEventBatch(1.0, [AllBlocksCleared()])


DIGEST = bytes(range(32))


@pytest.mark.parametrize(
    ("on_wire", "expected"),
    [(DIGEST, external_hash(DIGEST)), (b"\x01\x02", 0x0102), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1), (0, 0)],
)
@pytest.mark.parametrize("layout", ["map", "array"])
def test_hashes_of_every_form_become_64_bits(on_wire: Any, expected: int, layout: str) -> None:
    fields = {"block_hashes": [on_wire, 3], "parent_block_hash": on_wire, "token_ids": [], "block_size": 16}
    stored = {"type": "BlockStored", **fields} if layout == "map" else ["BlockStored", *fields.values()]
    removed = {"type": "BlockRemoved", "block_hashes": [on_wire]} if layout == "map" else ["BlockRemoved", [on_wire]]
    batch, rejected = decode_batch_lenient(pack([0.0, [stored, removed]]))
    assert batch.events == [BlockStored([expected, 3], expected, [], 16), BlockRemoved([expected])]
    assert not rejected


def test_layouts_mix_in_one_batch() -> None:
    payload = pack([0.0, [{"type": "BlockRemoved", "block_hashes": [1]}, ["BlockRemoved", [2], "GPU"]]])
    assert decode_batch(payload).events == [BlockRemoved([1]), BlockRemoved([2], "GPU")]


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ({"type": "BlockMoved", "block_hashes": [1]}, "unknown_type"),
        (["BlockMoved", 1], "unknown_type"),
        ({"block_hashes": [1]}, "unknown_type"),
        ([7], "unknown_type"),
        ([], "malformed"),
        (None, "malformed"),
        ("AllBlocksCleared", "malformed"),
        (["BlockStored", [1]], "malformed"),
        (["BlockStored", "hashes", None, [], 16], "malformed"),
        (["BlockStored", [b""], None, [], 16], "malformed"),
        (["BlockStored", [1.5], None, [], 16], "malformed"),
        (["BlockStored", [1], None, [-1], 16], "malformed"),
        (["BlockStored", [1], None, [2**32], 16], "malformed"),
        (["BlockStored", [1], None, [1], 16, None, 5], "malformed"),
        ({"type": "BlockStored", "block_hashes": [1], "token_ids": [], "block_size": 16}, "malformed"),
        ({"type": "BlockRemoved", "block_hashes": {}}, "malformed"),
        ({b"type": "BlockRemoved"}, "unknown_type"),
    ],
)
def test_a_bad_event_costs_that_event(bad: Any, kind: str) -> None:
    payload = pack([0.0, [["BlockRemoved", [1]], bad, {"type": "AllBlocksCleared"}]])
    batch, rejected = decode_batch_lenient(payload)
    assert batch.events == decode_batch(payload).events == [BlockRemoved([1]), AllBlocksCleared()]
    assert [(item.index, item.kind) for item in rejected] == [(1, kind)]
    assert rejected[0].reason


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"hello",
        pack(None),
        pack([]),
        pack([0.0]),
        pack(["now", []]),
        pack([0.0, {}]),
        pack({"ts": 0.0}),
        b"\x93",
    ],
)
def test_what_is_no_batch_is_an_error(payload: bytes) -> None:
    with pytest.raises(MalformedBatchError, match="not a KV event batch"):
        decode_batch(payload)


def test_deep_nesting_costs_the_event_or_the_batch() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(MalformedBatchError):
        decode_batch(deep)
    try:
        batch, rejected = decode_batch_lenient(b"\x92" + pack(0.0) + b"\x92" + deep + pack(["AllBlocksCleared"]))
    except MalformedBatchError:
        return
    assert batch.events == [AllBlocksCleared()]
    assert len(rejected) == 1


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_frames_never_raise_anything_else(data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.sampled_from(frames_of(STREAMS[0])[:6])))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    del payload[data.draw(st.integers(1, len(payload))) :]
    with contextlib.suppress(MalformedBatchError):
        decode_batch_lenient(bytes(payload))
