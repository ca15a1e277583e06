"""What a tier announces to whoever keeps an index of the fleet."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Final

from flexkv.cache.radixtree import Digests
from flexkv.common.block import SequenceMeta
from kvblocks.events import BlockRemoved, BlockStored
from kvblocks.hashing import external_hash, external_hashes

logger = logging.getLogger(__name__)

_MAX_HASHES_PER_EVENT: Final = 4096


class CacheEventLog:
    """Events of one tier, oldest first, until they are taken. Bounded: when nobody takes them the oldest are dropped.

    An index that missed events names blocks that are gone, or misses some that are there: slower, never wrong.
    """

    def __init__(self, medium: str, max_events: int = 65_536) -> None:
        """Keep at most `max_events` events of the tier that events call `medium`."""
        self._medium = medium
        self._events: deque[BlockStored | BlockRemoved] = deque(maxlen=max_events)
        self.num_dropped = 0

    def stored(self, sequence: SequenceMeta, first_block: int, num_blocks: int) -> None:
        """Announce blocks `[first_block, first_block + num_blocks)` of a sequence."""
        parent = external_hash(sequence.block_hashes[first_block - 1].tobytes()) if first_block else None
        # The namespace stands with block 0, as a cache salt does; the chain carries it to the blocks after it.
        extra_keys: list[tuple[Any, ...] | None] | None = None
        if sequence.namespace and first_block == 0:
            extra_keys = [sequence.namespace, *[None] * (num_blocks - 1)]
        self._append(
            BlockStored(
                block_hashes=external_hashes(sequence.block_hashes[first_block : first_block + num_blocks]).tolist(),
                parent_block_hash=parent,
                token_ids=sequence.block_tokens(first_block, num_blocks),
                block_size=sequence.tokens_per_block,
                medium=self._medium,
                extra_keys=extra_keys,
            )
        )

    def removed(self, digests: Digests) -> None:
        """Announce that these blocks are gone."""
        if not len(digests):
            return
        hashes = external_hashes(digests).tolist()
        for start in range(0, len(hashes), _MAX_HASHES_PER_EVENT):
            self._append(BlockRemoved(block_hashes=hashes[start : start + _MAX_HASHES_PER_EVENT], medium=self._medium))

    def take(self) -> list[BlockStored | BlockRemoved]:
        """Return the events since the last call, and forget them."""
        events = list(self._events)
        self._events.clear()
        return events

    def _append(self, event: BlockStored | BlockRemoved) -> None:
        if len(self._events) == self._events.maxlen:
            if self.num_dropped == 0:
                logger.warning("cache events dropped: nobody takes them medium=%s", self._medium)
            self.num_dropped += 1
        self._events.append(event)
