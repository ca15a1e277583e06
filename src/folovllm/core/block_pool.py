"""The device's KV blocks: who is free, who can be reused by content. Mirrors vllm/v1/core/block_pool.py.

free, no content --get_new_blocks--> in use --cache_full_blocks--> in use, hashed
      ^                                |                           ^          |
      |                           free_blocks                    touch   free_blocks
      |                                v                           |          v
      +---------------- (front of the free queue)        free, hashed (tail of the free queue)
                                                                   |
                                                      get_new_blocks: evicted, handed out anew
"""

from collections.abc import Iterable, Sequence

from folovllm.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock, get_event_extra_keys
from folovllm.request import Request
from kvblocks.events import MEDIUM_GPU, AllBlocksCleared, BlockRemoved, BlockStored, KVEvent
from kvblocks.hashing import external_hash

# This engine has one KV cache group, of full attention; vLLM names both in its events.
_GROUP_IDX = 0
_SPEC_KIND = "full_attention"


class BlockPool:
    """All blocks of the device; used by the scheduler's thread alone.

    Blocks of equal content are not merged: that would change block ids behind the requests that hold them, and block
    tables are append-only. So a hash names one or several blocks, and events count each of them.
    """

    def __init__(self, num_gpu_blocks: int, block_size: int, *, enable_caching: bool, enable_kv_cache_events: bool):
        assert num_gpu_blocks >= 2, "the pool needs the null block and one more"
        self.num_gpu_blocks = num_gpu_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.enable_kv_cache_events = enable_kv_cache_events
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_gpu_blocks)]
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks)
        # Hash -> its blocks by id, in the order they were cached.
        self._cached_blocks: dict[bytes, dict[int, KVCacheBlock]] = {}
        self._num_cached_blocks = 0
        self._event_queue: list[KVEvent] = []
        self.null_block = self.free_block_queue.popleft()
        self.null_block.is_null = True

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that requests can hold: all but the null block."""
        return self.num_gpu_blocks - 1

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, in use or free, whose content can be reused."""
        return self._num_cached_blocks

    def get_num_free_blocks(self) -> int:
        """Blocks that can be handed out, hashed ones included."""
        return self.free_block_queue.num_free_blocks

    def get_usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1.0 - self.get_num_free_blocks() / self.num_usable_blocks

    def get_cached_block(self, block_hash: bytes) -> KVCacheBlock | None:
        """A block of this content, or None."""
        blocks = self._cached_blocks.get(block_hash)
        return next(iter(blocks.values())) if blocks else None

    def cache_full_blocks(
        self, request: Request, blocks: Sequence[KVCacheBlock], num_cached_blocks: int, num_full_blocks: int
    ) -> None:
        """Offer `blocks[num_cached_blocks:num_full_blocks]` of the request's block table for reuse, and announce them.

        REQUIRES: caching is enabled, they are unhashed, and `request.block_hashes` reaches that far.
        """
        if num_cached_blocks >= num_full_blocks:
            return
        new_hashes = request.block_hashes[num_cached_blocks:num_full_blocks]
        for block, block_hash in zip(blocks[num_cached_blocks:num_full_blocks], new_hashes, strict=True):
            assert block.block_hash is None, f"{block} is cached already"
            assert block.ref_cnt > 0, f"{block} is not in use"
            block.block_hash = block_hash
            self._cached_blocks.setdefault(block_hash, {})[block.block_id] = block
        self._num_cached_blocks += len(new_hashes)
        if self.enable_kv_cache_events:
            parent = external_hash(request.block_hashes[num_cached_blocks - 1]) if num_cached_blocks else None
            span = slice(num_cached_blocks * self.block_size, num_full_blocks * self.block_size)
            self._event_queue.append(
                BlockStored(
                    block_hashes=[external_hash(block_hash) for block_hash in new_hashes],
                    parent_block_hash=parent,
                    token_ids=list(request.all_token_ids[span]),
                    block_size=self.block_size,
                    medium=MEDIUM_GPU,
                    extra_keys=get_event_extra_keys(request, num_cached_blocks, len(new_hashes)),
                    group_idx=_GROUP_IDX,
                    kv_cache_spec_kind=_SPEC_KIND,
                )
            )

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Hand out blocks, evicting the content of the least recently used. REQUIRES: so many are free."""
        assert num_blocks <= self.get_num_free_blocks(), f"{num_blocks} blocks asked for"
        new_blocks = [self.free_block_queue.popleft() for _ in range(num_blocks)]
        self._uncache(new_blocks)
        for block in new_blocks:
            block.ref_cnt = 1
        return new_blocks

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Take a reference to each block, so that a free one is not handed out."""
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference to each block; those nobody holds any more are reused in the order given.

        Blocks without reusable content go first, to the front of the queue; hashed ones to its tail (LRU).
        """
        freed = []
        for block in ordered_blocks:
            assert block.ref_cnt > 0, f"{block} freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        self.free_block_queue.prepend_n([block for block in freed if block.block_hash is None])
        self.free_block_queue.append_n([block for block in freed if block.block_hash is not None])

    def evict_blocks(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Stop offering these blocks for reuse, as their content is not what was hashed; who holds them keeps them."""
        self._uncache(blocks)

    def reset_prefix_cache(self, *, other_tiers_remain: bool = False) -> bool:
        """Forget all content; refused (False) while any block is in use.

        `other_tiers_remain`: a store behind the device keeps its blocks, so only the device's are announced as removed;
        AllBlocksCleared would say that the store holds nothing either.
        """
        if self.get_num_free_blocks() != self.num_usable_blocks:
            return False
        if other_tiers_remain:
            self._uncache(self.blocks)
        else:
            for block in self.blocks:
                block.block_hash = None
            if self.enable_kv_cache_events:
                self._event_queue.append(AllBlocksCleared())
        self._cached_blocks.clear()
        self._num_cached_blocks = 0
        return True

    def take_events(self) -> list[KVEvent]:
        """The events since the last call, in order."""
        events, self._event_queue = self._event_queue, []
        return events

    def check_integrity(self) -> None:
        """Assert the conservation law: a block is null, free or referenced; hashed exactly if the index has it."""
        free = self.free_block_queue.get_all_free_blocks()
        assert len(free) == self.free_block_queue.num_free_blocks == len({block.block_id for block in free})
        in_use = [block for block in self.blocks if block.ref_cnt > 0]
        assert not self.null_block.ref_cnt, "the null block was handed out"
        assert len(free) + len(in_use) == self.num_usable_blocks, "blocks leaked"
        assert all(block.ref_cnt == 0 and not block.is_null for block in free)
        hashed = {(block.block_hash, block.block_id) for block in self.blocks if block.block_hash is not None}
        indexed = {(block_hash, i) for block_hash, blocks in self._cached_blocks.items() for i in blocks}
        assert hashed == indexed, "index and blocks disagree"
        assert len(hashed) == self._num_cached_blocks

    def _uncache(self, blocks: Iterable[KVCacheBlock]) -> None:
        removed = []
        for block in blocks:
            if block.block_hash is None:
                continue
            same_content = self._cached_blocks[block.block_hash]
            del same_content[block.block_id]
            if not same_content:
                del self._cached_blocks[block.block_hash]
            removed.append(external_hash(block.block_hash))
            block.block_hash = None
        self._num_cached_blocks -= len(removed)
        if removed and self.enable_kv_cache_events:
            self._event_queue.append(BlockRemoved(block_hashes=removed, medium=MEDIUM_GPU, group_idx=_GROUP_IDX))
