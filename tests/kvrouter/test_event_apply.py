"""Event batches to the index: layouts, tiers, block sizes, extra keys, and batches that are not what they should be."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.kvrouter.event_engine import batch, cleared, removed, stored, tokens

from kvblocks.events import KVEventBatch, encode_batch
from kvrouter.kvblock.base import ApplyResult, PodEntry
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.token_processor import TokenProcessor

TOKENS = tokens(8)


class Pod:
    def __init__(self, block_size: int = 16, name: str = "A", index: InMemoryIndex | None = None) -> None:
        self.index = index if index is not None else InMemoryIndex()
        self.processor = TokenProcessor(block_size)
        self.applier = self.index.event_applier(self.processor)
        self.name = name

    def apply(self, payload: bytes, model: str = "m") -> ApplyResult:
        return self.applier.apply(self.name, model, payload)

    def prefix(self, model: str = "m", **asked: Any) -> float:
        return self.index.score(self.keys(model, **asked)).get(self.name, 0.0)

    def keys(self, model: str = "m", **asked: Any) -> np.ndarray:
        return self.processor.keys(np.array(TOKENS, np.uint32), model, **asked)


def test_both_layouts_and_both_hash_types_say_the_same() -> None:
    event = stored([2**64 - 1, 5], TOKENS[:32])
    maps, arrays, mixed = Pod(), Pod(), Pod()
    maps.apply(encode_batch(KVEventBatch(1.0, [event]), "map"))
    arrays.apply(encode_batch(KVEventBatch(1.0, [event]), "array"))
    as_bytes = ["BlockStored", [b"\0" * 24 + b"\xff" * 8, 5], None, TOKENS[:32], 16, None, "GPU", None, None, 0, "x", 1]
    mixed.apply(msgspec.msgpack.encode([1.0, [as_bytes]]))
    for pod in (maps, arrays, mixed):
        assert pod.prefix() == 2.0
        pod.apply(batch(removed(5)))
        assert pod.prefix() == 1.0
        signed = msgspec.msgpack.encode([1.0, [["BlockRemoved", [-1], "GPU", None, "more"]], 0, "more"])
        assert pod.apply(signed).num_removed == 1
        assert pod.prefix() == 0.0


def test_tiers_come_and_go_one_by_one() -> None:
    pod = Pod()
    pod.apply(batch(stored([1, 2], TOKENS[:32])))
    pod.apply(batch(stored([1, 2], [], medium="CPU")))  # no tokens: the blocks are known
    assert pod.index.lookup(pod.keys()[:1])[int(pod.keys()[0])] == [PodEntry("A"), PodEntry("A", "cpu")]
    pod.apply(batch(removed(1, 2)))
    assert pod.prefix() == pytest.approx(1.6)
    pod.apply(batch(stored([3], TOKENS[32:48], 2)))
    assert pod.prefix() == pytest.approx(2.6), "a parent in another tier is a parent"
    pod.apply(batch(removed(1, medium="CPU")))
    assert pod.prefix() == 0.0


def test_token_less_store_of_an_unknown_block_is_reported() -> None:
    pod = Pod()
    pod.apply(batch(stored([1], TOKENS[:16])))
    result = pod.apply(batch(stored([1, 9], [], medium="CPU")))
    assert result.rejected == {"unknown_block": 1}
    assert result.num_stored == 1


def test_store_whose_parent_is_unknown_is_not_guessed() -> None:
    pod = Pod()
    assert pod.apply(batch(stored([2], TOKENS[:16], 1))).rejected == {"unknown_parent": 1}
    assert pod.index.stats().num_blocks == 0


def test_group_and_rank_are_part_of_the_identity() -> None:
    pod = Pod()
    pod.apply(batch(stored([1], TOKENS[:16], group_idx=2), rank=3))
    key = int(pod.keys()[0])
    assert pod.index.lookup([key]) == {key: [PodEntry("A", "gpu", 2, 3)]}
    pod.apply(batch(removed(1), rank=3))
    assert pod.prefix() == 1.0
    pod.apply(batch(cleared(), rank=0))
    assert pod.prefix() == 1.0, "another rank's cache"
    assert pod.apply(batch(cleared(), rank=3)).num_cleared == 1
    assert pod.index.stats().num_records == 0


def test_models_and_pods_do_not_share_engine_keys() -> None:
    index = InMemoryIndex()
    a, b = Pod(name="A", index=index), Pod(name="B", index=index)
    a.apply(batch(stored([1], TOKENS[:16])), "m1")
    assert a.apply(batch(stored([2], TOKENS[16:32], 1)), "m2").rejected == {"unknown_parent": 1}
    assert b.apply(batch(stored([2], TOKENS[16:32], 1)), "m1").rejected == {"unknown_parent": 1}
    assert a.prefix("m1") == 1.0
    assert a.prefix("m2") == a.prefix("") == 0.0


@pytest.mark.parametrize("engine_block", [16, 32, 64])
@pytest.mark.parametrize("asked", [{}, {"cache_salt": "s"}, {"lora_name": "l"}, {"cache_salt": "s", "lora_name": "l"}])
def test_salts_and_adapters_match_only_themselves(engine_block: int, asked: dict[str, str]) -> None:
    pod = Pod()
    num_blocks = len(TOKENS) // engine_block
    lora = [asked["lora_name"]] if "lora_name" in asked else []
    salt = [asked["cache_salt"]] if "cache_salt" in asked else []
    extra = [(*lora, *salt) or None] + [tuple(lora) or None] * (num_blocks - 1)
    event = stored(
        range(num_blocks), TOKENS, block_size=engine_block, extra_keys=extra, lora_name=asked.get("lora_name")
    )
    pod.apply(batch(event))
    for other in ({}, {"cache_salt": "s"}, {"lora_name": "l"}, {"cache_salt": "s", "lora_name": "l"}):
        assert pod.prefix(**other) == (8.0 if other == asked else 0.0)


def test_adapter_of_an_engine_without_extra_keys_counts() -> None:
    pod = Pod()
    pod.apply(batch(stored([1, 2], TOKENS[:32], lora_name="l")))
    assert pod.prefix(lora_name="l") == 2.0


def test_sparse_span_names_its_last_blocks() -> None:
    pod = Pod()
    pod.apply(batch(stored([3], TOKENS[:48])))
    keys = pod.keys()
    assert pod.index.lookup(keys) == {}
    assert pod.index.lookup(keys[2:3]) == {int(keys[2]): [PodEntry("A")]}


@pytest.mark.parametrize("engine_block", [4, 8, 16, 32, 128])
def test_engine_blocks_of_any_fitting_size_give_the_same_keys(engine_block: int) -> None:
    pod = Pod()
    half = max(1, len(TOKENS) // engine_block // 2) * engine_block
    num_first, num_rest = half // engine_block, (len(TOKENS) - half) // engine_block
    pod.apply(batch(stored(range(100, 100 + num_first), TOKENS[:half], block_size=engine_block)))
    if num_rest:
        rest = stored(range(200, 200 + num_rest), TOKENS[half:], 99 + num_first, block_size=engine_block)
        pod.apply(batch(rest))
    assert pod.prefix() == 8.0


def test_one_bad_event_costs_that_event() -> None:
    pod = Pod()
    good = msgspec.msgpack.decode(encode_batch(KVEventBatch(1.0, [stored([1], TOKENS[:16])])))[1][0]
    bad: list[tuple[Any, str]] = [
        ({"type": "BlockTeleported"}, "unknown_type"),
        (["BlockStored"], "malformed_event"),
        ({"type": "BlockStored", "token_ids": [1]}, "malformed_event"),
        ({**good, "token_ids": [-1] * 16}, "malformed_event"),
        ({**good, "token_ids": [2**32] * 16}, "malformed_event"),
        ({**good, "token_ids": TOKENS[:17]}, "malformed_event"),
        ({**good, "block_hashes": [1, 2]}, "malformed_event"),
        ({**good, "block_hashes": ["1"]}, "malformed_event"),
        ({**good, "medium": 1}, "malformed_event"),
        ({**good, "extra_keys": [[1.5]]}, "malformed_event"),
        ({**good, "block_size": 0}, "malformed_event"),
        ({**good, "block_size": 24, "token_ids": TOKENS[:24]}, "block_size"),
        (None, "malformed_event"),
        (17, "malformed_event"),
        ({}, "malformed_event"),
        ([], "malformed_event"),
    ]
    for event, reason in bad:
        payload = msgspec.msgpack.encode([1.0, [event, good], 0])
        result = pod.apply(payload)
        assert result.rejected == {reason: 1}, event
        assert result.num_stored == 1
        pod.apply(batch(cleared()))


def test_cut_off_batch_changes_nothing() -> None:
    whole = batch(stored([1, 2], TOKENS[:32]), removed(1))
    for length in range(len(whole)):
        pod = Pod()
        assert pod.apply(whole[:length]).rejected == {"malformed_batch": 1}
        assert pod.index.stats().num_records == 0


def test_fuzzed_batches_never_corrupt_the_index() -> None:
    rng = random.Random(5)
    whole = batch(stored([1, 2, 3], TOKENS[:48], extra_keys=[("s",), None, None]), removed(3), cleared())
    pod = Pod()
    for _ in range(20_000):
        mutated = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        pod.apply(bytes(mutated))
    pod.index.clear("A")
    assert pod.index.stats().num_records == pod.index.stats().num_blocks == 0
    pod.apply(batch(stored([1, 2], TOKENS[:32])))
    assert pod.prefix() == 2.0
