"""The scheduler's dealings with its KV connector: hits, loads under way, loads that failed, blocks kept for a transfer.

Block tables belong to the KVCacheManager; this module decides from when on a transfer no longer needs one.

    request ends --> no transfer uses its blocks: freed at once
                 --> a load still writes them, or the connector saves them: held until the worker half reports the end
"""

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_connector import KVConnector
from folovllm.core.sched.output import KVConnectorOutput
from folovllm.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExternalHit:
    """What the connector can load behind the device's own hit."""

    num_tokens: int = 0
    is_async: bool = False


@dataclass(slots=True)
class LoadFailures:
    """Which requests a report of invalid blocks touches."""

    first_bad_block: dict[str, int] = field(default_factory=dict)
    """Request id -> index in its block table from which on the content is not to be trusted."""
    direct: set[str] = field(default_factory=set)
    """Of these, the requests that hold a block whose own load failed; the others computed behind such a block."""


class _Transfer(enum.Enum):
    RECVING = enum.auto()
    SENDING = enum.auto()


class KVTransfers:
    """Bookkeeping around one connector, or around none; used by the scheduler's thread alone."""

    def __init__(
        self,
        connector: KVConnector | None,
        manager: KVCacheManager,
        failure_policy: Literal["recompute", "fail"] = "recompute",
    ) -> None:
        self.connector = connector
        self.failure_policy = failure_policy
        self._manager = manager
        # Unfinished or held requests whose asynchronous load is under way.
        self._loading: set[str] = set()
        # Finished requests whose blocks a transfer still uses, and what it waits for.
        self._held: dict[str, tuple[Request, set[_Transfer]]] = {}

    @property
    def held_request_ids(self) -> set[str]:
        """Finished requests that still hold blocks."""
        return set(self._held)

    @property
    def has_pending(self) -> bool:
        """Whether blocks are kept or requests wait for the connector."""
        return bool(self._loading or self._held)

    def is_loading(self, request: Request) -> bool:
        """Whether an asynchronous load still writes the request's blocks."""
        return request.request_id in self._loading

    def match(self, request: Request, num_local_tokens: int) -> ExternalHit | None:
        """What the connector has behind the local hit; None when it does not know yet."""
        if self.connector is None or request.kv_load_failed or request.skip_reading_prefix_cache:
            return ExternalHit()
        num_tokens, is_async = self.connector.get_num_new_matched_tokens(request, num_local_tokens)
        if num_tokens is None:
            return None
        # A step that loads also computes: one token at least must be left for it.
        num_missing = request.num_tokens - num_local_tokens - (0 if is_async else 1)
        num_tokens = max(0, min(num_tokens, num_missing))
        return ExternalHit(num_tokens, is_async and num_tokens > 0)

    def on_allocated(self, request: Request, hit: ExternalHit) -> None:
        """The request got its blocks; an asynchronous load begins here."""
        if self.connector is None:
            return
        if hit.is_async:
            self._loading.add(request.request_id)
        blocks = self._manager.get_blocks(request.request_id)
        self.connector.update_state_after_alloc(request, blocks, hit.num_tokens)

    def release(self, request: Request) -> None:
        """The request ended: free its blocks, at once or when no transfer uses them any more."""
        awaited: set[_Transfer] = set()
        if self.is_loading(request):
            awaited.add(_Transfer.RECVING)
        if self.connector is not None:
            block_ids = self._manager.get_block_ids(request.request_id)
            is_sending, _ = self.connector.request_finished(request, block_ids)
            if is_sending:
                awaited.add(_Transfer.SENDING)
        if awaited:
            self._held[request.request_id] = (request, awaited)
        else:
            self._manager.free(request)

    def on_worker_report(self, output: KVConnectorOutput) -> set[str]:
        """Take note of the transfers that ended; returns the ids whose load ended and that are not finished."""
        loaded = set()
        for request_id in output.finished_recving:
            if request_id not in self._loading:
                logger.warning("connector reported a load that nobody waits for: request_id=%s", request_id)
                continue
            self._loading.discard(request_id)
            if request_id in self._held:
                self._end_held(request_id, _Transfer.RECVING)
            else:
                loaded.add(request_id)
        for request_id in output.finished_sending:
            if request_id in self._held:
                self._end_held(request_id, _Transfer.SENDING)
        return loaded

    def find_load_failures(self, invalid_block_ids: set[int], requests: Iterable[Request]) -> LoadFailures:
        """Trace failed loads through all block tables.

        What was computed behind a bad block is bad as well, and such a block may be in the table of a request that got
        its own copy of the bad one from elsewhere; so the search is repeated until it finds nothing new.
        """
        tables = {r.request_id: self._manager.get_block_ids(r.request_id) for r in requests}
        failures = LoadFailures(direct={i for i, table in tables.items() if not invalid_block_ids.isdisjoint(table)})
        bad = set(invalid_block_ids)
        found_more = bool(failures.direct)
        while found_more:
            found_more = False
            for request_id, table in tables.items():
                known = failures.first_bad_block.get(request_id, len(table))
                first = next((i for i, block_id in enumerate(table[:known]) if block_id in bad), None)
                if first is not None:
                    failures.first_bad_block[request_id] = first
                    bad.update(table[first:])
                    found_more = True
        return failures

    def _end_held(self, request_id: str, transfer: _Transfer) -> None:
        request, awaited = self._held[request_id]
        awaited.discard(transfer)
        if not awaited:
            del self._held[request_id]
            self._manager.free(request)
