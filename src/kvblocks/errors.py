"""What can go wrong in `kvblocks`, and whose fault it is."""

from __future__ import annotations


class KVBlocksError(Exception):
    """Base of every error raised by this package."""


class UnknownAlgorithmError(KVBlocksError, ValueError):
    """The hash algorithm asked for does not exist; the message lists those that do."""


class InvalidHashInputError(KVBlocksError, ValueError):
    """Token ids, extra keys, a parent digest or a block size cannot be hashed; the message says which and why."""


class MalformedBatchError(KVBlocksError, ValueError):
    """A payload is not a batch of KV events at all, so nothing of it can be used."""


class PublisherError(KVBlocksError, RuntimeError):
    """A publisher could not be started on its endpoint, or was used after `close`."""


class ReplayError(KVBlocksError, RuntimeError):
    """The replay socket of an engine answered with something that is not the replay protocol."""


class ReplayTimeoutError(ReplayError, TimeoutError):
    """The end marker of a replay did not arrive before the deadline."""
