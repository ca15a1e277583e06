"""The free queue and the hashing of a request's blocks."""

import json
from pathlib import Path

import pytest
from tests.folovllm.core_fakes import make_request

from folovllm.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock, get_event_extra_keys
from kvblocks.hashing import BlockHasher

VECTORS = Path(__file__).parents[1] / "vectors" / "block_hashes.json"


def ids(queue: FreeKVCacheBlockQueue) -> list[int]:
    return [block.block_id for block in queue.get_all_free_blocks()]


def make_queue(num_blocks: int) -> tuple[FreeKVCacheBlockQueue, list[KVCacheBlock]]:
    blocks = [KVCacheBlock(i) for i in range(num_blocks)]
    return FreeKVCacheBlockQueue(blocks), blocks


def test_queue_hands_out_in_order_of_freeing() -> None:
    queue, _ = make_queue(3)
    first = queue.popleft()
    queue.append_n([first])
    assert ids(queue) == [1, 2, 0]
    assert queue.num_free_blocks == 3


def test_queue_removes_from_the_middle_and_both_ends() -> None:
    queue, blocks = make_queue(5)
    for index in (2, 0, 4):
        queue.remove(blocks[index])
    assert ids(queue) == [1, 3]
    queue.prepend_n([blocks[0], blocks[2]])
    assert ids(queue) == [0, 2, 1, 3]
    assert queue.num_free_blocks == 4


def test_queue_refuses_a_block_twice_and_an_empty_pop() -> None:
    queue, blocks = make_queue(1)
    with pytest.raises(AssertionError, match="free already"):
        queue.append_n([blocks[0]])
    queue.popleft()
    with pytest.raises(AssertionError, match="no free block"):
        queue.popleft()
    with pytest.raises(AssertionError, match="not free"):
        queue.remove(blocks[0])


def test_request_hashes_equal_hashing_the_whole_sequence() -> None:
    request = make_request("r", range(10), salt="tenant")
    for token in range(100, 123):
        request.append_output_token_ids([token])
    tokens = [*range(10), *range(100, 123)]
    keys = [(("cache_salt", "tenant"),), *[None] * 7]
    assert request.block_hashes == BlockHasher(block_size=4).hash_blocks(tokens, keys)


def test_prompt_shorter_than_a_block_gets_its_salt_once_the_block_is_full() -> None:
    salted, plain = make_request("a", [1, 2], salt="s"), make_request("b", [1, 2])
    for request in (salted, plain):
        assert request.block_hashes == []
        request.append_output_token_ids([3, 4])
    assert salted.block_hashes != plain.block_hashes
    assert salted.block_hashes == BlockHasher(block_size=4).hash_blocks([1, 2, 3, 4], [(("cache_salt", "s"),)])


def test_a_requests_hashes_are_vllms_without_a_seed() -> None:
    (group,) = [g for g in json.loads(VECTORS.read_text()) if g["algo"] == "sha256_cbor" and g["seed"] is None]
    salts = {"0..63": None, "large ids": None, "salt": "s3cr3t"}
    cases = {case["name"]: case for case in group["cases"]}
    for name, salt in salts.items():
        request = make_request("r", cases[name]["tokens"], block_size=cases[name]["block_size"], salt=salt)
        assert [block_hash.hex() for block_hash in request.block_hashes] == cases[name]["hashes_hex"]


def test_events_carry_the_salt_of_block_zero_alone() -> None:
    request = make_request("r", range(12), salt="s")
    assert get_event_extra_keys(request, 0, 2) == [("s",), None]
    assert get_event_extra_keys(request, 1, 2) == [None, None]
    assert get_event_extra_keys(make_request("p", range(12)), 0, 3) == [None, None, None]
