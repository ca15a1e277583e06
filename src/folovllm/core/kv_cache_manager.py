"""Which blocks each request holds. Mirrors vllm/v1/core/kv_cache_manager.py."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock, cdiv
from folovllm.request import Request
from kvblocks.events import KVEvent


@dataclass(frozen=True, slots=True)
class KVCacheBlocks:
    """Blocks of a request in token order; what connectors get to see."""

    blocks: tuple[KVCacheBlock, ...] = ()

    def get_block_ids(self) -> tuple[list[int], ...]:
        """Block ids per KV cache group: of the one group there is."""
        return ([block.block_id for block in self.blocks],)


class KVCacheManager:
    """Block tables over one `BlockPool`; used by the scheduler's thread alone.

    A table is append-only while its request runs; it ends with `free`, or is cut by `truncate` while the request waits:

        blocks   | local hit | external  | new ...        | . . .
        hashed   | full blocks whose KV is computed, being computed, or loaded |

    **Hits on blocks of the same step.** A block is offered for reuse when the step that computes it is *scheduled*, so
    a request scheduled later in that step can hit it. That is sound because a layer of the model writes the K and V of
    all the step's tokens before any of its rows attends, and because a block is never hashed before the step that
    computes it is scheduled. When a failed load proves the content wrong, `evict_from` takes the offer back before the
    next step is scheduled. Blocks of an asynchronous load are hashed after it ended (`delay_cache_blocks`).
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        block_size: int,
        *,
        enable_caching: bool = True,
        enable_kv_cache_events: bool = False,
    ) -> None:
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.block_pool = BlockPool(
            num_gpu_blocks,
            block_size,
            enable_caching=enable_caching,
            enable_kv_cache_events=enable_kv_cache_events,
        )
        self.capacity_tokens = self.block_pool.num_usable_blocks * block_size
        """Tokens that one request can hold when it has the pool to itself."""
        self._req_to_blocks: dict[str, list[KVCacheBlock]] = {}
        # Leading blocks of the table that are hashed.
        self._num_cached_blocks: dict[str, int] = {}

    @property
    def usage(self) -> float:
        """Share of the pool in use, 0 to 1."""
        return self.block_pool.get_usage()

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int]:
        """The longest run of the request's full blocks that the pool holds, and its tokens; takes no reference.

        At least one token is left to compute, as a step must yield logits: a prompt that is wholly cached and fills its
        last block computes that block again. A request may have to compute all its prompt: it finds nothing.
        """
        if not self.enable_caching or request.skip_reading_prefix_cache:
            return KVCacheBlocks(), 0
        blocks = []
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            block = self.block_pool.get_cached_block(block_hash)
            if block is None:
                break
            blocks.append(block)
        return KVCacheBlocks(tuple(blocks)), len(blocks) * self.block_size

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
    ) -> KVCacheBlocks | None:
        """Give the request slots for its next tokens; None, with nothing changed, when there is no room.

            | num_computed_tokens | new_computed (local hit) | external | num_new_tokens |
            | held already        | found in the pool        | slots for both are made   |

        Args:
            request: the request; its `num_computed_tokens` is as before this step.
            num_new_tokens: tokens to compute in this step; 0 when it only waits for a load.
            num_new_computed_tokens: tokens of `new_computed_blocks`.
            new_computed_blocks: the hit of `get_computed_blocks`; only for a request that holds no block.
            num_external_computed_tokens: tokens that the connector loads behind the local hit.
            delay_cache_blocks: an asynchronous load writes the blocks; they are hashed by `cache_blocks` after it.

        Returns:
            The new blocks, without the hit ones.
        """
        hit = new_computed_blocks.blocks if new_computed_blocks is not None else ()
        held = self._req_to_blocks.get(request.request_id, [])
        assert not (hit and held), "a prefix hit comes before any other block"
        num_computed = request.num_computed_tokens + num_new_computed_tokens + num_external_computed_tokens
        num_tokens = num_computed + num_new_tokens
        num_new_blocks = max(0, cdiv(num_tokens, self.block_size) - len(held) - len(hit))
        num_hit_free = sum(1 for block in hit if block.ref_cnt == 0)
        if num_new_blocks + num_hit_free > self.block_pool.get_num_free_blocks():
            return None
        self.block_pool.touch(hit)  # before new blocks are taken, or they would be evicted for them
        new_blocks = self.block_pool.get_new_blocks(num_new_blocks)
        if hit:
            self._num_cached_blocks[request.request_id] = len(hit)
        self._req_to_blocks.setdefault(request.request_id, held).extend((*hit, *new_blocks))
        if not delay_cache_blocks:
            # What a step in flight is yet to sample has no hash; see Scheduler.update_from_output.
            self.cache_blocks(request, min(num_tokens, request.num_tokens))
        return KVCacheBlocks(tuple(new_blocks))

    def has_slots(self, request: Request, num_new_tokens: int) -> bool:
        """Whether the next tokens fit into the request's last block and do not fill it: nothing is to be allocated.

        That is so for most tokens of a running request, and answered in a quarter of the time of `allocate_slots`.
        """
        return 0 < request.num_computed_tokens % self.block_size < self.block_size - num_new_tokens

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Offer the request's full blocks within its first `num_computed_tokens` for reuse."""
        if not self.enable_caching:
            return
        num_cached = self._num_cached_blocks.get(request.request_id, 0)
        num_full = num_computed_tokens // self.block_size
        if num_full > num_cached:
            blocks = self._req_to_blocks[request.request_id]
            self.block_pool.cache_full_blocks(request, blocks, num_cached, num_full)
            self._num_cached_blocks[request.request_id] = num_full

    def free(self, request: Request) -> None:
        """Drop all the request's blocks, the last first, so that the tail of its prefix is evicted before the head."""
        blocks = self._req_to_blocks.pop(request.request_id, [])
        self._num_cached_blocks.pop(request.request_id, None)
        self.block_pool.free_blocks(reversed(blocks))

    def evict_from(self, request: Request, first_block: int) -> None:
        """Take back the offer of the request's blocks from `first_block` on: their content is not to be trusted."""
        blocks = self._req_to_blocks.get(request.request_id, [])
        self.block_pool.evict_blocks(blocks[first_block:])

    def truncate(self, request: Request, num_blocks: int) -> None:
        """Keep the first `num_blocks` of the request's blocks and drop the others."""
        blocks = self._req_to_blocks.get(request.request_id, [])
        dropped = blocks[num_blocks:]
        del blocks[num_blocks:]
        if request.request_id in self._num_cached_blocks:
            self._num_cached_blocks[request.request_id] = min(num_blocks, self._num_cached_blocks[request.request_id])
        self.block_pool.free_blocks(reversed(dropped))

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        """The request's whole block table; empty for one that holds none."""
        return KVCacheBlocks(tuple(self._req_to_blocks.get(request_id, ())))

    def get_block_ids(self, request_id: str) -> list[int]:
        """The ids of the request's blocks in token order."""
        return [block.block_id for block in self._req_to_blocks.get(request_id, ())]

    def holds_blocks(self, request_id: str) -> bool:
        """Whether the request has any block."""
        return bool(self._req_to_blocks.get(request_id))

    def reset_prefix_cache(self, *, other_tiers_remain: bool = False) -> bool:
        """Forget all reusable content; refused (False) while any block is in use. See `BlockPool`."""
        return self.block_pool.reset_prefix_cache(other_tiers_remain=other_tiers_remain)

    def take_events(self) -> list[KVEvent]:
        """The device's KV events since the last call, in order."""
        return self.block_pool.take_events()

    def check_integrity(self, request_ids: Iterable[str] | None = None) -> None:
        """Assert that references equal block tables, and that only `request_ids` (when given) hold any block."""
        self.block_pool.check_integrity()
        references = [0] * self.block_pool.num_gpu_blocks
        for request_id, blocks in self._req_to_blocks.items():
            assert request_ids is None or not blocks or request_id in request_ids, f"{request_id} still holds blocks"
            assert _are_distinct(blocks), f"{request_id} holds a block twice"
            for block in blocks:
                references[block.block_id] += 1
        assert references == [block.ref_cnt for block in self.block_pool.blocks], "references and block tables differ"


def _are_distinct(blocks: Sequence[KVCacheBlock]) -> bool:
    return len({block.block_id for block in blocks}) == len(blocks)
