"""Blocks, the queue of free ones, and the hashes of a request's blocks. Mirrors vllm/v1/core/kv_cache_utils.py."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from folovllm.request import BlockHashFn, Request
from kvblocks.extra_keys import untag_extra_keys
from kvblocks.hashing import BlockHasher, build_extra_keys


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """One block of the device pool."""

    block_id: int
    ref_cnt: int = 0
    """Block tables it is in. At 0 it is in the free queue, but keeps its hash and content until it is handed out."""
    block_hash: bytes | None = None
    """Digest of its content, once it is full and offered for reuse."""
    is_null: bool = False
    """Block 0: a placeholder that is never handed out."""
    # Links of FreeKVCacheBlockQueue; only the queue touches them.
    prev_free_block: "KVCacheBlock | None" = field(default=None, repr=False)
    next_free_block: "KVCacheBlock | None" = field(default=None, repr=False)


class FreeKVCacheBlockQueue:
    """Doubly linked through the blocks themselves, so that a hit block leaves the middle in O(1).

    popleft -> | unhashed ... | hashed, least recently used ... most recently used | <- append
    """

    def __init__(self, blocks: Sequence[KVCacheBlock]) -> None:
        self.num_free_blocks = 0
        # Sentinels spare every operation the special cases of an end.
        self._head = KVCacheBlock(-1)
        self._tail = KVCacheBlock(-1)
        self._head.next_free_block = self._tail
        self._tail.prev_free_block = self._head
        self.append_n(blocks)

    def popleft(self) -> KVCacheBlock:
        """Take the block to reuse next. REQUIRES: not empty."""
        block = self._head.next_free_block
        assert block is not None, "sentinel lost"
        assert block is not self._tail, "no free block"
        self.remove(block)
        return block

    def remove(self, block: KVCacheBlock) -> None:
        """Take one block out. REQUIRES: it is in the queue."""
        before, after = block.prev_free_block, block.next_free_block
        assert before is not None, f"{block} is not free"
        assert after is not None, f"{block} is not free"
        before.next_free_block, after.prev_free_block = after, before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def append_n(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Add blocks to the tail: the first of them is reused before the others."""
        before = self._tail.prev_free_block
        assert before is not None, "sentinel lost"
        self._insert_after(before, blocks)

    def prepend_n(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Add blocks to the front: the first of them is reused next."""
        self._insert_after(self._head, blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """All free blocks in the order of reuse; O(n), for tests."""
        blocks = []
        block = self._head.next_free_block
        while block is not None and block is not self._tail:
            blocks.append(block)
            block = block.next_free_block
        return blocks

    def _insert_after(self, before: KVCacheBlock, blocks: Iterable[KVCacheBlock]) -> None:
        after = before.next_free_block
        assert after is not None, "sentinel lost"
        for block in blocks:
            assert block.next_free_block is None, f"{block} is free already"
            block.prev_free_block, before.next_free_block = before, block
            before = block
            self.num_free_blocks += 1
        before.next_free_block, after.prev_free_block = after, before


def get_request_block_hasher(hasher: BlockHasher) -> BlockHashFn:
    """A function that hashes what `request.block_hashes` lacks, each block chained to the one before.

    The cache salt enters block 0 and through the chain all others, so tenants of different salts share nothing.
    """
    block_size = hasher.block_size

    def hash_new_blocks(request: Request) -> list[bytes]:
        num_hashed = len(request.block_hashes)
        num_full = request.num_tokens // block_size
        if num_full == num_hashed:
            return []
        tokens = list(request.all_token_ids[num_hashed * block_size : num_full * block_size])
        if num_hashed:
            return hasher.hash_blocks(tokens, parent=request.block_hashes[-1])
        return hasher.hash_blocks(tokens, build_extra_keys(num_full, cache_salt=request.cache_salt))

    return hash_new_blocks


def get_event_extra_keys(request: Request, first_block: int, num_blocks: int) -> list[tuple[object, ...] | None]:
    """The extra keys of a run of blocks as events publish them, one entry per block."""
    keys: list[tuple[object, ...] | None] = [None] * num_blocks
    if first_block == 0:
        keys = untag_extra_keys(build_extra_keys(num_blocks, cache_salt=request.cache_salt)) or keys
    return keys


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
