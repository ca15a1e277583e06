from __future__ import annotations

import array
import hashlib
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblocks import _native
from kvblocks.errors import InvalidHashInputError, KVBlocksError, UnknownAlgorithmError
from kvblocks.extra_keys import build_extra_keys, encode_cbor, untag_extra_keys
from kvblocks.hashing import ALGORITHMS, BlockHasher, external_hash, external_hashes

GROUPS = json.loads((Path(__file__).parents[1] / "vectors" / "block_hashes.json").read_text())
CASES = [
    pytest.param(group, case, id=f"{group['algo']}-{group['seed']}-{case['name']}")
    for group in GROUPS
    for case in group["cases"]
]

tokens_strategy = st.lists(
    st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1])), max_size=80
)
key_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=30), st.binary(max_size=300)),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=6,
)
extra_entry = st.one_of(st.none(), st.lists(key_value, max_size=3).map(tuple))


def oracle(hasher: BlockHasher, tokens: list[int], extra: list[Any] | None, parent: bytes | None) -> list[bytes]:
    """The definition, one block at a time, over cbor2 and pickle."""
    digest = (lambda b: hashlib.sha256(b).digest()) if "sha256" in hasher.algorithm else xxhash.xxh3_128_digest
    if hasher.algorithm.endswith("cbor"):

        def dump(value: object) -> bytes:
            return cbor2.dumps(value, canonical=True)
    else:

        def dump(value: object) -> bytes:
            return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)

    size, out, previous = hasher.block_size, [], parent or hasher.none_hash
    for i in range(len(tokens) // size):
        previous = digest(
            dump((previous, tuple(tokens[i * size : (i + 1) * size]), (extra[i] if extra else None) or None))
        )
        out.append(previous)
    return out


@pytest.mark.parametrize(("group", "case"), CASES)
def test_digests_equal_vllms(group: dict[str, Any], case: dict[str, Any]) -> None:
    hasher = BlockHasher(group["algo"], group["seed"], case["block_size"])
    assert hasher.none_hash.hex() == group["none_hash_hex"]
    digests = hasher.hash_blocks(case["tokens"], case["extra_keys"])
    assert [digest.hex() for digest in digests] == case["hashes_hex"]
    assert [external_hash(digest) for digest in digests] == case["external"]
    packed = hasher.hash_blocks_packed(np.array(case["tokens"]), case["extra_keys"])
    assert packed.tobytes() == b"".join(digests)
    assert external_hashes(packed).tolist() == case["external"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), tokens=tokens_strategy, block_size=st.integers(1, 40))
def test_any_chain_equals_the_definition(
    algorithm: str, data: st.DataObject, tokens: list[int], block_size: int
) -> None:
    hasher = BlockHasher(algorithm, "42", block_size)
    num_blocks = len(tokens) // block_size
    extra = data.draw(st.none() | st.lists(extra_entry, min_size=num_blocks, max_size=num_blocks))
    parent = data.draw(st.none() | st.binary(min_size=hasher.digest_size, max_size=hasher.digest_size))
    assert hasher.hash_blocks(tokens, extra, parent) == oracle(hasher, tokens, extra, parent)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), tokens=tokens_strategy, block_size=st.integers(1, 9))
def test_a_chain_hashed_in_parts_equals_the_whole(
    algorithm: str, data: st.DataObject, tokens: list[int], block_size: int
) -> None:
    hasher = BlockHasher(algorithm, "1", block_size)
    whole = hasher.hash_blocks(tokens)
    cut = data.draw(st.integers(0, len(whole)))
    head = hasher.hash_blocks(tokens[: cut * block_size])
    tail = hasher.hash_blocks(tokens[cut * block_size :], parent=head[-1] if head else None)
    assert head + tail == whole


@settings(deadline=None, max_examples=100)
@given(tokens=tokens_strategy, block_size=st.integers(1, 70), extra_size=st.integers(0, 200))
def test_sha_instructions_equal_portable_code(tokens: list[int], block_size: int, extra_size: int) -> None:
    ids = np.array(tokens, np.uint32)
    num_blocks = len(tokens) // block_size
    offsets = np.arange(num_blocks + 1, dtype=np.uint64) * np.uint64(extra_size)
    outputs = []
    for portable in (False, True):
        out = np.zeros((num_blocks, 32), np.uint8)
        native = _native.BlockHasher("sha256_cbor", bytes(32), block_size, portable)
        native.hash_chain(ids, b"", b"\x55" * (extra_size * num_blocks), offsets, out)
        outputs.append(out.tobytes())
    assert outputs[0] == outputs[1]


@given(value=key_value)
def test_extra_key_encoding_is_canonical_cbor(value: Any) -> None:
    assert encode_cbor(value) == cbor2.dumps(value, canonical=True)


@pytest.mark.parametrize(
    "as_input",
    [
        list,
        tuple,
        lambda ids: array.array("I", ids),
        lambda ids: array.array("q", ids),
        lambda ids: memoryview(array.array("I", ids)),
        *[lambda ids, t=t: np.array(ids, t) for t in (np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4")],
        lambda ids: np.repeat(np.array(ids), 2)[::2],
        lambda ids: [np.int64(i) for i in ids],
    ],
)
def test_every_kind_of_token_ids_hashes_alike_and_is_not_changed(as_input: Any) -> None:
    ids = [(i * 7919) % 32768 for i in range(50)]
    given_ids = as_input(ids)
    for algorithm in ALGORITHMS:
        hasher = BlockHasher(algorithm, "0")
        assert hasher.hash_blocks(given_ids) == hasher.hash_blocks(ids)
    assert list(given_ids) == ids


def test_read_only_arrays_are_accepted() -> None:
    ids = np.arange(32, dtype=np.uint32)
    ids.flags.writeable = False
    assert len(BlockHasher().hash_blocks_packed(ids)) == 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", [-1, 2**32, -(2**63), 2**63, 2**64])
def test_token_out_of_range_is_named(algorithm: str, bad: int) -> None:
    hasher = BlockHasher(algorithm, "0", 4)
    with pytest.raises(InvalidHashInputError, match=rf"token_ids\[2\] is {bad}"):
        hasher.hash_blocks([1, 2, bad, 3])
    if -(2**63) <= bad < 2**64:
        ids = np.array([1, 2, bad, 3], np.int64 if bad < 2**63 else np.uint64)
        with pytest.raises(InvalidHashInputError, match=rf"token_ids\[2\] is {bad}"):
            hasher.hash_blocks(ids)


@pytest.mark.parametrize(
    "bad", [[1.0] * 16, ["1"] * 16, [None] * 16, [True] * 16, np.ones(16), np.ones((2, 16), int), b"x" * 16, "x" * 16]
)
def test_what_is_no_token_list_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidHashInputError, match="token"):
        BlockHasher().hash_blocks(bad)


def test_a_list_that_shrinks_while_read_is_an_error_not_a_crash() -> None:
    class Evil:
        def __index__(self) -> int:
            ids.clear()
            return 1

    ids: list[Any] = [Evil(), *range(31)]
    with pytest.raises(InvalidHashInputError, match="is gone"):
        BlockHasher().hash_blocks(ids)


def test_unknown_algorithm_names_the_known() -> None:
    with pytest.raises(UnknownAlgorithmError, match="sha256, sha256_cbor, xxhash, xxhash_cbor"):
        BlockHasher("md5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": -16}, "block_size"),
        ({"block_size": "16"}, "block_size"),
        ({"seed": 42}, "seed"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KVBlocksError, match=message):
        BlockHasher(**arguments)


@pytest.mark.parametrize("parent", [b"", b"short", bytes(16), "0" * 32])
def test_a_parent_of_another_size_is_refused(parent: Any) -> None:
    with pytest.raises(InvalidHashInputError, match="parent is a digest of 32 bytes"):
        BlockHasher().hash_blocks(range(16), parent=parent)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([None], "1 entries, but the tokens fill 2 blocks"),
        ([None] * 3, "3 entries"),
        ([None, "salt"], r"extra_keys\[1\] has type str"),
        ([(("mm", 1.5),), None], r"extra_keys\[0\]\[0\]\[1\] has type float"),
        ([None, ({"a": 1},)], r"extra_keys\[1\]\[0\] has type dict"),
        ([None, ("\ud800",)], "not valid Unicode"),
    ],
)
def test_bad_extra_keys_are_named(extra: list[Any], message: str) -> None:
    with pytest.raises(InvalidHashInputError, match=message):
        BlockHasher().hash_blocks(list(range(32)), extra)


def test_endless_extra_keys_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InvalidHashInputError, match="nested deeper"):
        BlockHasher().hash_blocks(list(range(16)), [endless])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_extra_keys_count_as_none(algorithm: str) -> None:
    hasher = BlockHasher(algorithm, "0")
    ids = list(range(32))
    assert hasher.hash_blocks(ids, [(), []]) == hasher.hash_blocks(ids, [None, None]) == hasher.hash_blocks(ids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tokens_short_of_a_block_have_no_digest(algorithm: str) -> None:
    hasher = BlockHasher(algorithm, "0")
    assert hasher.hash_blocks([]) == hasher.hash_blocks(list(range(15))) == []
    packed = hasher.hash_blocks_packed([])
    assert packed.shape == (0, hasher.digest_size)
    assert external_hashes(packed).shape == (0,)


def test_seedless_xxhash_is_random_and_seedless_sha256_is_not() -> None:
    assert BlockHasher("xxhash_cbor").none_hash != BlockHasher("xxhash_cbor").none_hash
    assert BlockHasher("sha256_cbor").none_hash == BlockHasher("sha256_cbor", "vllm-none-hash").none_hash


def test_lora_is_on_every_block_and_the_salt_on_the_first() -> None:
    lora = ("lora", "Alice", "/adapters/alice")
    salt = ("cache_salt", "s3cr3t")
    assert build_extra_keys(3) is None
    assert build_extra_keys(3, cache_salt="") is None
    assert build_extra_keys(3, cache_salt="s3cr3t") == [(salt,), None, None]
    assert build_extra_keys(2, lora=lora[1:], cache_salt="s3cr3t") == [(lora, salt), (lora,)]
    assert build_extra_keys(0, lora=lora[1:], cache_salt="s3cr3t") == []


def test_published_extra_keys_lose_tags_and_the_adapter_path() -> None:
    keys = [(("lora", "Alice", "/adapters/alice"), ("mm", "img0", -12), ("cache_salt", "s3cr3t")), None]
    assert untag_extra_keys(keys) == [("Alice", ("img0", -12), "s3cr3t"), None]
    assert untag_extra_keys(None) is untag_extra_keys([]) is None


def test_one_hasher_serves_many_threads() -> None:
    hasher = BlockHasher()
    ids = [np.arange(start, start + 16 * 500, dtype=np.uint32) for start in range(4)]
    expected = [hasher.hash_blocks(item) for item in ids]
    results: list[list[bytes]] = [[] for _ in ids]

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = hasher.hash_blocks(ids[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_native_code_checks_sizes_itself() -> None:
    with pytest.raises(ValueError, match="no native algorithm"):
        _native.BlockHasher("sha256", bytes(32), 16)
    native = _native.BlockHasher("sha256_cbor", bytes(32), 16)
    no_offsets = np.empty(0, np.uint64)
    with pytest.raises(ValueError, match="out has the wrong size"):
        native.hash_chain(np.zeros(32, np.uint32), b"", b"", no_offsets, np.empty((1, 32), np.uint8))
    with pytest.raises(ValueError, match="parent has the wrong size"):
        native.hash_chain(np.zeros(16, np.uint32), b"x", b"", no_offsets, np.empty((1, 32), np.uint8))


@pytest.mark.parametrize("bad", [np.zeros((2, 32), np.int8), np.zeros(32, np.uint8), np.zeros((2, 4), np.uint8)])
def test_external_hashes_want_packed_digests(bad: Any) -> None:
    with pytest.raises(InvalidHashInputError, match="packed digests"):
        external_hashes(bad)


def test_external_hash_wants_eight_bytes() -> None:
    with pytest.raises(InvalidHashInputError, match="at least 8"):
        external_hash(b"1234567")
