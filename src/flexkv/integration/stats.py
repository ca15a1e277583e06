"""What a connector half did since it was last asked, in the form vLLM calls KVConnectorStats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from flexkv.transfer.device_worker import CopyStats

COUNTERS = (
    "num_loads",
    "loaded_blocks",
    "load_seconds",
    "num_stores",
    "stored_blocks",
    "store_seconds",
    "num_failed",
)
"""Names of the counters: those of `CopyStats`."""


@dataclass(slots=True)
class FlexKVStats:
    """Counters of one interval; those of several workers or steps add up.

    Attributes:
        data: value by name, see `COUNTERS`.
    """

    data: dict[str, float] = field(default_factory=dict)

    def aggregate(self, other: FlexKVStats) -> Self:
        """Add another's counters to these."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the counters for a log line."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())

    def reset(self) -> None:
        """Start from zero."""
        self.data = {}


class StatsInterval:
    """Turns counters that only grow into what was added since the last call. For one thread."""

    def __init__(self) -> None:
        """Start from zero."""
        self._last = dict.fromkeys(COUNTERS, 0.0)

    def take(self, stats: CopyStats) -> FlexKVStats | None:
        """Return what was added, or None if nothing was."""
        now = {name: float(getattr(stats, name)) for name in COUNTERS}
        added = FlexKVStats({name: now[name] - self._last[name] for name in COUNTERS})
        self._last = now
        return None if added.is_empty() else added
