"""What can go wrong in `flexkv`, and whose fault it is.

A cache miss, a pool that is full and a block that could not be loaded are values, not errors: the engine recomputes.
"""

from __future__ import annotations


class FlexKVError(Exception):
    """Base of every error raised by this package."""


class ConfigError(FlexKVError, ValueError):
    """An option has an unknown name or a value it cannot have; the message names it and what is allowed."""


class InvalidRequestError(FlexKVError, ValueError):
    """The caller passed token ids, a mask, slots or a namespace that make no sense; the message says which and why."""


class CacheStateError(FlexKVError, RuntimeError):
    """An operation the cache index cannot be in a state for: freeing twice, a stale handle, a broken invariant."""


class TransferError(FlexKVError, RuntimeError):
    """A copy between tiers failed or could not be started."""


class ServerError(FlexKVError, RuntimeError):
    """The server of another process refused a request or is gone."""
