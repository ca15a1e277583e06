"""What the event path counts, by kind; each kind that means trouble is logged the first time it happens."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Final

logger = logging.getLogger(__name__)

BENIGN: Final = frozenset(
    {"messages", "blocks_stored", "blocks_removed", "pods_cleared", "replays", "replayed_messages"}
)
"""Kinds that happen on a good day."""


class EventCounters:
    """Counts by kind; any thread may use it.

    Besides `BENIGN`: "malformed_message", the rejections of `ApplyResult.rejected`, "overflows" (messages dropped
    because a queue was full), "gaps", "generations" (restarts of an engine noticed), "histories_lost",
    "replays_failed", "expirations", "too_many_streams" (messages of streams beyond the limit), "subscriber_failed" and
    "workers_failed" (threads that ended for good).
    """

    def __init__(self) -> None:
        """Start all counts at zero."""
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, count: int = 1, pod: str = "") -> None:
        """Count; `pod` only serves the log."""
        if not count:
            return
        with self._lock:
            is_first = kind not in self._counts
            self._counts[kind] += count
        if is_first and kind not in BENIGN:
            logger.warning("kv events trouble, logged once per kind kind=%s pod=%s", kind, pod)

    def __getitem__(self, kind: str) -> int:
        with self._lock:
            return self._counts[kind]

    def snapshot(self) -> dict[str, int]:
        """Return all counts so far."""
        with self._lock:
            return dict(self._counts)
