from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.block import SequenceMeta, chain_root, normalise_namespace
from flexkv.errors import InvalidRequestError
from kvblocks.hashing import BlockHasher

BLOCK = 4
HASHER = BlockHasher(block_size=BLOCK)


def sequence(token_ids: Any, namespace: Any = None) -> SequenceMeta:
    return SequenceMeta.from_tokens(token_ids, BLOCK, HASHER, namespace)


def test_blocks_are_hashed_as_kvblocks_hashes_them() -> None:
    tokens = list(range(11))
    meta = sequence(tokens)
    assert meta.num_blocks == 2
    assert meta.num_tokens == 11
    assert [row.tobytes() for row in meta.block_hashes] == HASHER.hash_blocks(tokens)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_type_names_the_same_blocks(dtype: type) -> None:
    expected = sequence(list(range(8))).block_hashes
    assert np.array_equal(sequence(np.arange(8, dtype=dtype)).block_hashes, expected)
    assert np.array_equal(sequence(np.arange(16, dtype=dtype)[::2] // 2).block_hashes, expected)


def test_torch_tensors_are_taken() -> None:
    assert np.array_equal(sequence(torch.arange(8)).block_hashes, sequence(list(range(8))).block_hashes)


def test_a_sequence_is_independent_of_the_callers_array() -> None:
    tokens = np.arange(8, dtype=np.uint32)
    meta = sequence(tokens)
    tokens[:] = 0
    assert meta.block_tokens(1, 1) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="read-only"):
        meta.token_ids[0] = 1


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3]])
def test_a_prompt_shorter_than_a_block_has_none(tokens: list[int]) -> None:
    meta = sequence(tokens)
    assert meta.num_blocks == 0
    assert meta.block_hashes.shape == (0, 32)


def test_namespaces_have_no_block_in_common() -> None:
    tokens = list(range(12))
    namespaces = [None, "", "a", "b", "ab", ("a", "b"), ("ab", ""), ("", "ab"), '["a", "b"]', ("a", "b", "")]
    digests = [row.tobytes() for name in namespaces for row in sequence(tokens, name).block_hashes]
    assert len(set(digests)) == 3 * len(namespaces)


def test_a_namespace_has_the_same_blocks_every_time() -> None:
    fresh = BlockHasher(block_size=BLOCK)
    assert chain_root(fresh, ("a",)) == chain_root(HASHER, ("a",))
    assert chain_root(fresh, ()) == HASHER.none_hash
    assert chain_root(BlockHasher(seed="other", block_size=BLOCK), ("a",)) != chain_root(HASHER, ("a",))
    assert np.array_equal(sequence(range_list(8), "a").block_hashes, sequence(range_list(8), ("a",)).block_hashes)


def range_list(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.zeros((2, 4), np.int64), "one-dimensional"),
        (np.zeros(4), "integers"),
        (np.zeros(4, bool), "integers"),
        ([1, 2, 3, -1], "-1"),
        ([1, 2, 3, 2**32], str(2**32)),
    ],
)
def test_bad_tokens_are_refused(tokens: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        sequence(tokens)


@pytest.mark.parametrize("namespace", [1, ["a"], ("a", 1), b"a"])
def test_bad_namespaces_are_refused(namespace: Any) -> None:
    with pytest.raises(InvalidRequestError, match="namespace"):
        normalise_namespace(namespace)


def test_a_hasher_of_another_block_size_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="16 per block"):
        SequenceMeta.from_tokens([1], 16, HASHER)


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_sequences_share_exactly_the_blocks_of_their_common_prefix(left: list[int], right: list[int]) -> None:
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    shared = {row.tobytes() for row in sequence(left).block_hashes} & {
        row.tobytes() for row in sequence(right).block_hashes
    }
    assert len(shared) == common // BLOCK


def test_a_root_and_a_namespace_are_told_apart():
    roots = {chain_root(HASHER, ("a",), ()), chain_root(HASHER, (), ("a",)), chain_root(HASHER, ("a",), ("a",))}
    assert len(roots | {HASHER.none_hash}) == 4
