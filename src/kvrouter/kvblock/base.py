"""The contract of the block index: which pods hold which KV blocks, in which tier.

A *request key* names a block by its content: the low 64 bits of its chained hash, made by `TokenProcessor` from token
ids, model, LoRA adapter and cache salt. The model is part of every key (it seeds the chain), so two models never share
an entry and no method here takes a model. An *engine key* names the same block as its engine does in its events. Each
pod has its own map from engine keys to request keys, so engines may differ in seed, algorithm and block size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvrouter.errors import InvalidKeysError

if TYPE_CHECKING:
    from kvrouter.kvblock.token_processor import TokenProcessor

Keys: TypeAlias = npt.NDArray[np.uint64] | Sequence[int]
"""Block keys: a uint64 array `[num_blocks]` (not copied), or a sequence of int in 0..2**64-1."""

DEFAULT_TIER_WEIGHTS: Final[Mapping[str, float]] = MappingProxyType({"gpu": 1.0, "cpu": 0.8, "storage": 0.5})
"""What one cached block is worth by the tier that holds it."""

UNKNOWN_TIER_WEIGHT: Final = 1.0
"""Weight of a tier that the weights do not name."""


@dataclass(frozen=True, slots=True)
class PodEntry:
    """One holder of a block; all four fields together are its identity.

    Attributes:
        pod: name of the pod.
        tier: where in the pod, in lower case: "gpu", "cpu", "storage", or what the engine calls it.
        group: KV cache group of a hybrid model.
        rank: data-parallel rank.
    """

    pod: str
    tier: str = "gpu"
    group: int = 0
    rank: int = 0


_NO_REJECTIONS: Final[Mapping[str, int]] = MappingProxyType({})


class ApplyResult(NamedTuple):
    """What one batch of events did to the index.

    Attributes:
        num_events: events in the batch, rejected ones included.
        num_stored: block records that events added or referenced once more.
        num_removed: block records that events released.
        num_cleared: `AllBlocksCleared` events applied.
        rank: data-parallel rank of the batch.
        rejected: events left out, by reason: "malformed_batch" (counts once, nothing of it was used),
            "malformed_event", "unknown_type", "unknown_parent", "unknown_block" (a store without tokens of a block
            that the index does not know) or "block_size" (neither a multiple nor a divisor of the index's).
    """

    num_events: int
    num_stored: int
    num_removed: int
    num_cleared: int
    rank: int
    rejected: Mapping[str, int] = _NO_REJECTIONS


class EventApplier(Protocol):
    """Applies encoded event batches to an index; any thread may call it, one at a time per (pod, model)."""

    def apply(self, pod: str, model: str, payload: bytes) -> ApplyResult:
        """Apply one msgpack event batch that `pod` published for `model`; never raises for what the bytes say."""


class Index(ABC):
    """Which pods hold which blocks. Every method may be called from any thread."""

    @abstractmethod
    def add(self, engine_keys: Keys | None, request_keys: Keys, entries: Sequence[PodEntry]) -> None:
        """Record that every entry holds every block of `request_keys`.

        Repeated adds of the same (engine key, entry) are counted, and as many evictions take them back.

        Args:
            engine_keys: the engine's names of the same blocks. None: the request keys themselves. As many as there are
                request keys; or a divisor (one engine block covers several keys); or a multiple (several engine blocks
                make up one key, which is held as long as the last of them is).
            request_keys: uint64 `[num_blocks]`.
            entries: the holders.

        Raises:
            InvalidKeysError: the numbers of keys do not fit together, or a key is not in 0..2**64-1.
        """

    @abstractmethod
    def evict(self, engine_key: int, entries: Sequence[PodEntry]) -> None:
        """Take back one add of `engine_key` for each entry; tier, group and rank must match. Unknown is no error."""

    @abstractmethod
    def clear(self, pod: str, rank: int | None = None) -> int:
        """Forget every block of the pod, or of one data-parallel rank of it; costs that pod's blocks, not the index.

        Returns the number of records dropped.
        """

    @abstractmethod
    def lookup(self, request_keys: Keys, pods: Sequence[str] | None = None) -> dict[int, list[PodEntry]]:
        """Return the holders of each key, up to and without the first key that nobody (of `pods`) holds.

        Args:
            request_keys: the blocks of a prompt, in order.
            pods: the pods asked about; None means all, an empty sequence none.
        """

    @abstractmethod
    def score(
        self, request_keys: Keys, pods: Sequence[str] | None = None, weights: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Return, for each pod that holds key 0, the summed tier weights of its longest run of keys from key 0 on.

        Equal to `LongestPrefixScorer(weights).score(keys, lookup(keys, pods))`, in one step.

        Args:
            request_keys: the blocks of a prompt, in order.
            pods: the pods asked about; None means all, an empty sequence none.
            weights: worth of a block by tier; None means `DEFAULT_TIER_WEIGHTS`. Unnamed tiers weigh 1.0.
        """

    @abstractmethod
    def get_request_key(self, engine_key: int) -> int | None:
        """Return the (last) request key recorded for an engine key by any pod, None if there is none."""

    @abstractmethod
    def event_applier(self, token_processor: TokenProcessor) -> EventApplier:
        """Return what applies event batches to this index, computing request keys as `token_processor` does."""


def as_key_array(keys: Keys, name: str = "request_keys") -> npt.NDArray[np.uint64]:
    """Return keys as a contiguous uint64 array `[n]`, itself if it is one already.

    Raises:
        InvalidKeysError: a key that is not an integer in 0..2**64-1, or more than one dimension.
    """
    if isinstance(keys, np.ndarray):
        array = keys
        if array.dtype != np.uint64 or array.ndim != 1:
            raise InvalidKeysError(
                f"{name} is a uint64 array [n] or a sequence of int, not {array.dtype} {array.shape}"
            )
        return np.ascontiguousarray(array)
    try:
        return np.fromiter(keys, np.uint64, count=len(keys))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidKeysError(f"{name} holds something that is no integer in 0..2**64-1: {error}") from error
