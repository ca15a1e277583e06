"""The native block index (csrc/kvrouter). Every call releases the GIL while it works."""

from collections.abc import Sequence
from typing import Final, final

import numpy as np
import numpy.typing as npt

MAX_BLOCKS: Final[int]
"""Largest `size` of an index."""

MAX_PARTS: Final[int]
"""Most request keys that one engine block may cover."""

REJECTIONS: Final[tuple[str, ...]]
"""Names of the counts that `EventApplier.apply` returns last, in order."""

@final
class BlockIndex:
    """Which pods hold which blocks; any thread may call any method."""

    def __init__(self, size: int, pod_cache_size: int) -> None:
        """Make an index of at most `size` blocks with `pod_cache_size` holders each; ValueError if out of range."""

    def add(
        self,
        pod: str,
        tier: str,
        group: int,
        rank: int,
        engine_keys: npt.NDArray[np.uint64],
        request_keys: npt.NDArray[np.uint64],
        parts: Sequence[int],
    ) -> None:
        """Add a reference per block: `[n]` engine keys, request keys, and places inside their engine block."""

    def evict(self, pod: str, tier: str, group: int, rank: int, engine_keys: npt.NDArray[np.uint64]) -> int:
        """Take a reference of each engine key back; returns the number of records found."""

    def clear(self, pod: str, rank: int | None) -> int:
        """Forget what a pod, or one rank of it, holds; returns the number of records."""

    def lookup(self, keys: npt.NDArray[np.uint64], pods: Sequence[str] | None) -> list[tuple[int, list[int]]]:
        """Return runs of keys with the same holders: (number of keys, owner ids, oldest first)."""

    def score(
        self,
        keys: npt.NDArray[np.uint64],
        pods: Sequence[str] | None,
        weights: Sequence[tuple[str, float]],
        default_weight: float,
    ) -> dict[str, float]:
        """Return the summed tier weights of each pod's longest run from key 0 on."""

    def request_key(self, engine_key: int) -> int | None:
        """Return the last request key that any pod recorded for an engine key."""

    def owner(self, owner_id: int) -> tuple[str, str, int, int]:
        """Return (pod, tier, group, rank) of an owner id; it never changes."""

    def stats(self) -> tuple[int, int, int, int]:
        """Return (blocks, records, bytes of memory, blocks evicted for lack of room)."""

@final
class EventApplier:
    """Applies event batches of one pod and model; any thread may call it."""

    def __init__(self, index: BlockIndex, pod: str, model: str, algorithm: str, root: bytes, block_size: int) -> None:
        """Bind a pod and a model; `root` is the digest standing for the parent of first blocks."""

    def apply(self, payload: bytes) -> tuple[int, int, int, int, int, list[int] | None]:
        """Apply a msgpack batch; returns (events, stored, removed, clears, rank, rejections or None for none)."""
