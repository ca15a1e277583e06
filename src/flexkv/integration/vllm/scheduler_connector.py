"""The scheduler half: what can be loaded for a request, and what is kept of it when it ends.

    waiting request --match--> task (blocks locked in the store)
                    --blocks allocated--> launched; the worker half opens its gate in this step
                    --finished_recving--> computed from there on, or from scratch if the load failed
    finished request --> put of its full blocks; the engine keeps them until finished_sending

A store that fails or is slow is a miss. It is never an error of a request.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv.common.request import ResponseStatus
from flexkv.errors import FlexKVError
from flexkv.integration.config import ResolvedConfig
from flexkv.integration.vllm.metadata import FlexKVConnectorMetadata, LoadSpec
from flexkv.kvmanager import KVManager
from kvblocks.events import BlockRemoved, BlockStored

logger = logging.getLogger(__name__)

_WORKER_TIMEOUT_S = 5.0
"""How long to wait at start for the worker halves, which engines build first, in seconds."""
_RESET_TIMEOUT_S = 2.0
"""How long a reset waits for the store to close what its worker half has ended, in seconds."""
_SETTLE_TIMEOUT_S = 0.05
"""How long to wait for the store to learn that a save has ended, which its worker half knows, in seconds."""


@dataclass(frozen=True, slots=True)
class _Match:
    task_id: int
    num_tokens: int  # of the request, when it was matched
    first_block: int
    num_blocks: int


class SchedulerConnector:
    """Called by the engine's scheduler thread only. Owns the store."""

    def __init__(self, config: ResolvedConfig) -> None:
        """Make and start the store of this engine.

        Raises:
            ConfigError: the store cannot be made as configured.
        """
        self._config = config
        self._block_size = config.cache.tokens_per_block
        self.store = KVManager(
            config.model,
            config.cache,
            dp_client_id=config.dp_rank,
            runtime_dir=config.runtime_dir,
            store_key=config.store_key,
        )
        self.store.start()
        if not self.store.wait_ready(_WORKER_TIMEOUT_S):
            logger.warning("no device worker yet: nothing is cached until all ranks=%d came", config.model.tp_size)
        self._matches: dict[str, _Match] = {}
        self._loads: dict[str, LoadSpec] = {}  # launched, and not reported to have ended
        self._saves: dict[str, int] = {}  # task by request, not reported to have ended
        # Tasks the worker half reported to have ended; the store may know a moment later.
        self._ended: deque[int] = deque(maxlen=config.cache.transfer.max_tasks)
        self._load_failed: set[str] = set()  # not matched again until they end: the same load would fail again
        self._step = FlexKVConnectorMetadata()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens beyond those on the device the store can load, in whole blocks, asynchronously."""
        request_id = request.request_id
        if not self._config.can_load or request_id in self._load_failed or request_id in self._loads:
            return 0, False
        match = self._matches.get(request_id)
        if match is None or not self._is_current(match, request, num_computed_tokens):
            self._drop_match(request_id)
            # The last token is always computed: its logits are what the request is for.
            num_blocks = (request.num_tokens - 1) // self._block_size
            match = self._find(request, num_computed_tokens, num_blocks)
        if match is None:
            return 0, False
        self._matches[request_id] = match
        return match.num_blocks * self._block_size, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Launch the load into the blocks the request got for its external tokens."""
        request_id = request.request_id
        if num_external_tokens == 0:
            self._drop_match(request_id)
            return
        num_blocks = num_external_tokens // self._block_size
        match = self._matches.pop(request_id, None)
        if match is not None and match.num_blocks > num_blocks:  # the engine takes less than was offered
            self.store.cancel([match.task_id])
            match = self._find(request, match.first_block * self._block_size, match.first_block + num_blocks)
        # Computed tokens are those before the external ones; their blocks come first in the request's table.
        table: list[int] = blocks.get_block_ids()[0]
        first = match.first_block if match is not None else max(0, len(table) - num_blocks)
        block_ids = list(table[first : first + num_blocks])
        task_id = self._launch(match, block_ids)
        self._loads[request_id] = self._step.loads[request_id] = LoadSpec(task_id, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> FlexKVConnectorMetadata:
        """Return what the worker half may begin in this step."""
        step, self._step = self._step, FlexKVConnectorMetadata()
        return step

    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of loads that ended or failed."""
        invalid = set(getattr(connector_output, "invalid_block_ids", None) or ())
        if invalid:
            self._load_failed.update(
                request_id for request_id, load in self._loads.items() if not invalid.isdisjoint(load.block_ids)
            )
        for request_id in connector_output.finished_recving or ():
            load = self._loads.pop(request_id, None)
            if load is not None and load.task_id is not None:
                self._ended.append(load.task_id)
        saved = [self._saves.pop(r) for r in connector_output.finished_sending or () if r in self._saves]
        if saved:  # a request that comes next shall find what the engine was told is stored
            self.store.wait(saved, _SETTLE_TIMEOUT_S)
            self._ended.extend(saved)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Put the request's full blocks; True while they are needed for that."""
        request_id = request.request_id
        self._drop_match(request_id)
        self._load_failed.discard(request_id)
        # A load still writes these blocks; the engine itself holds them until that has ended.
        if request_id in self._loads or not self._config.can_save:
            return False, None
        num_blocks = min(request.num_computed_tokens, request.num_tokens) // self._block_size
        task_id = self._put(request, block_ids[:num_blocks])
        if task_id is None:
            return False, None
        self._saves[request_id] = self._step.saves[request_id] = task_id
        return True, None

    def take_events(self) -> Iterable[BlockStored | BlockRemoved]:
        """Return what the store's tiers stored and removed since the last call."""
        return self.store.take_events()

    def reset_cache(self) -> bool:
        """Forget what the store holds; False while copies are under way."""
        for request_id in list(self._matches):
            self._drop_match(request_id)
        self.store.wait(self._ended, _RESET_TIMEOUT_S, completely=True)
        self._ended.clear()
        return self.store.reset()

    def shutdown(self) -> None:
        """Stop the store. Idempotent."""
        self.store.shutdown()

    # -- inside ----------------------------------------------------------------------------------------------------
    def _find(self, request: Any, num_computed_tokens: int, end_block: int) -> _Match | None:
        """Match and lock what the store has of blocks `[num_computed_tokens / block_size, end_block)`."""
        first_block, rest = divmod(num_computed_tokens, self._block_size)
        namespace = _namespace(request)
        if rest or first_block >= end_block or namespace is None:
            return None
        tokens = _tokens(request, end_block * self._block_size)
        wanted = np.arange(len(tokens)) >= num_computed_tokens
        try:
            task_id, mask = self.store.get_match(tokens, wanted, namespace)
        except FlexKVError as error:
            logger.warning("lookup failed request_id=%s error=%s", request.request_id, error)
            return None
        num_blocks = int(np.count_nonzero(mask)) // self._block_size
        return _Match(task_id, request.num_tokens, first_block, num_blocks) if num_blocks else None

    def _is_current(self, match: _Match, request: Any, num_computed_tokens: int) -> bool:
        return match.num_tokens == request.num_tokens and match.first_block * self._block_size == num_computed_tokens

    def _drop_match(self, request_id: str) -> None:
        match = self._matches.pop(request_id, None)
        if match is not None:
            self.store.cancel([match.task_id])

    def _launch(self, match: _Match | None, block_ids: list[int]) -> int | None:
        """Launch a match; None if it cannot be, so that the load fails."""
        if match is None:
            return None
        try:
            self.store.launch([match.task_id], [self._slots(block_ids)])
        except FlexKVError as error:
            logger.warning("load not launched task_id=%d error=%s", match.task_id, error)
            self.store.cancel([match.task_id])
            return None
        answer = self.store.try_wait([match.task_id]).get(match.task_id)
        if answer is not None and answer.status is ResponseStatus.FAILED:
            return None  # what it waited for could not be read: the worker half would wait for nothing
        return match.task_id

    def _put(self, request: Any, block_ids: list[int]) -> int | None:
        """Store blocks of a finished request as far as they are missing; None if nothing is to be copied."""
        namespace = _namespace(request)
        if not block_ids or namespace is None:
            return None
        tokens = _tokens(request, len(block_ids) * self._block_size)
        try:
            task_id, mask = self.store.put_match(tokens, None, namespace)
            if not mask.any():
                return None
            first_block = int(mask.argmax()) // self._block_size
            num_blocks = int(np.count_nonzero(mask)) // self._block_size
            self.store.launch([task_id], [self._slots(block_ids[first_block : first_block + num_blocks])])
        except FlexKVError as error:
            logger.warning("request not stored request_id=%s error=%s", request.request_id, error)
            return None
        return task_id

    def _slots(self, block_ids: list[int]) -> npt.NDArray[np.int64]:
        starts = np.asarray(block_ids, np.int64)[:, None] * self._block_size
        return (starts + np.arange(self._block_size)).ravel()


def _tokens(request: Any, count: int) -> npt.NDArray[np.int64]:
    return np.asarray(request.all_token_ids[:count], np.int64)


def _namespace(request: Any) -> tuple[str, ...] | None:
    """Who may share this request's blocks; None when its token ids do not say what they hold."""
    if getattr(request, "mm_features", None) or getattr(request, "prompt_embeds", None) is not None:
        return None  # placeholders stand for images or embeddings
    salt = (request.cache_salt,) if request.cache_salt else ()
    lora = getattr(request, "lora_request", None)
    # A salt stands alone, as engines publish it; an adapter is spelled out, so that none is taken for a salt.
    return ("lora", lora.lora_name, *salt) if lora is not None else salt
