"""The token masks and slot mappings of the public API, turned into runs of blocks.

slot = block id * tokens_per_block + position in the block
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv.common.transfer import BlockIds
from flexkv.errors import InvalidRequestError


def as_array(values: Any, name: str) -> npt.NDArray[Any]:
    """Return a list, numpy array or torch tensor as a one-dimensional array, without a copy where it can be.

    Raises:
        InvalidRequestError: it has another number of dimensions.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        raise InvalidRequestError(f"{name} is one-dimensional, not of shape {list(array.shape)}")
    return array


def block_run(token_mask: Any, num_tokens: int, tokens_per_block: int) -> tuple[int, int]:
    """Return the blocks `[first, end)` under a mask: one run of True from a block boundary on, its tail dropped.

    Raises:
        InvalidRequestError: the mask is not such a run, not bool, or not as long as the tokens.
    """
    if token_mask is None:
        return 0, num_tokens // tokens_per_block
    mask = as_array(token_mask, "token_mask")
    if mask.dtype != np.bool_ or len(mask) != num_tokens:
        raise InvalidRequestError(f"token_mask is bool [{num_tokens}], not {mask.dtype} [{len(mask)}]")
    marked = np.flatnonzero(mask)
    if len(marked) == 0:
        return 0, 0
    first, end = int(marked[0]), int(marked[-1]) + 1
    if end - first != len(marked):
        raise InvalidRequestError("token_mask has more than one run of True")
    if first % tokens_per_block:
        raise InvalidRequestError(
            f"token_mask begins at token {first}, which is not a multiple of the {tokens_per_block} tokens of a block"
        )
    first_block = first // tokens_per_block
    return first_block, max(first_block, end // tokens_per_block)


def slots_to_blocks(slot_mapping: Any, num_slots: int, tokens_per_block: int) -> BlockIds:
    """Return the device blocks, int64 `[num_slots / tokens_per_block]`, that slots stand for.

    Raises:
        InvalidRequestError: not `num_slots` integers, not whole blocks in token order, or a block twice.
    """
    slots = as_array(slot_mapping, "slot_mapping")
    if slots.size == 0 == num_slots:
        return np.empty(0, np.int64)
    if slots.dtype.kind not in "iu" or len(slots) != num_slots:
        raise InvalidRequestError(f"slot_mapping is integers [{num_slots}], not {slots.dtype} [{len(slots)}]")
    rows = slots.astype(np.int64).reshape(-1, tokens_per_block)
    blocks = rows[:, 0] // tokens_per_block
    expected = blocks[:, None] * tokens_per_block + np.arange(tokens_per_block)
    if np.any(rows != expected) or np.any(blocks < 0):
        raise InvalidRequestError(
            f"slot_mapping does not name whole blocks of {tokens_per_block} consecutive slots from a block boundary on"
        )
    if len(np.unique(blocks)) != len(blocks):
        raise InvalidRequestError("slot_mapping names a block twice")
    return np.ascontiguousarray(blocks)
