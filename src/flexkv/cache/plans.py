"""What the control plane decided for a request, and how it has fared so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexkv.common.transfer import TransferOpGraph

PlanKind = Literal["get", "put"]


@dataclass(frozen=True, slots=True, eq=False)
class CachePlan:
    """What one request will load or store: blocks `[first_block, first_block + num_blocks)` of its sequence.

    Attributes:
        graph: the copies, their device side not bound yet; None when there is nothing to copy.
        caller_op_ids: the ops whose end makes the caller's data safe: on the device (get), off the device (put).
    """

    plan_id: int
    kind: PlanKind
    graph: TransferOpGraph | None
    first_block: int
    num_blocks: int
    caller_op_ids: frozenset[int] = frozenset()


@dataclass(slots=True)
class CacheStats:
    """A snapshot: counters since the start, in blocks unless named otherwise, and the present sizes of the tiers."""

    num_gets: int = 0
    num_puts: int = 0
    num_queried: int = 0
    """Blocks that gets asked for beyond those the device had."""
    num_hit: int = 0
    num_loaded: int = 0
    """Of these, blocks that came, or are on their way, from a lower tier."""
    num_stored: int = 0
    num_evicted: int = 0
    num_failed: int = 0
    """Removed because a copy into or out of them failed, or because a put was given up."""
    num_rejected: int = 0
    """Not stored for lack of room."""
    num_events_dropped: int = 0
    num_total_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_in_flight_blocks: int = 0
    num_ssd_stored: int = 0
    num_ssd_evicted: int = 0
    num_ssd_failed: int = 0
    num_ssd_total_blocks: int = 0
    num_ssd_cached_blocks: int = 0
