"""Which URL opens which store."""

from __future__ import annotations

from typing import Final

from flexkv.common.config import ResilienceConfig
from flexkv.errors import ConfigError
from flexkv.storage.remote.base import RemoteBackend
from flexkv.storage.remote.mooncake import MooncakeStore
from flexkv.storage.remote.posix import PosixStore
from flexkv.storage.remote.redis import RedisStore
from flexkv.storage.remote.resilient import ResilientStore
from flexkv.storage.remote.s3 import S3Store
from flexkv.storage.remote.url import parse_url

SCHEMES: Final[dict[str, type[PosixStore | RedisStore | S3Store | MooncakeStore]]] = {
    "file": PosixStore,
    "redis": RedisStore,
    "rediss": RedisStore,
    "unix": RedisStore,
    "s3": S3Store,
    "mooncake": MooncakeStore,
}


def open_remote_store(url: str, *, block_bytes: int, resilience: ResilienceConfig | None = None) -> ResilientStore:
    """Open the store at `url`, for blocks of `block_bytes`, with retries and a circuit breaker around it.

    A server that cannot be reached is no error here: calls miss until it can.

    Raises:
        ConfigError: an unknown scheme or option, a directory that cannot be written, an extra that is not installed.
    """
    return ResilientStore(open_backend(url, block_bytes=block_bytes), resilience)


def open_backend(url: str, *, block_bytes: int) -> RemoteBackend:
    """Open the bare store at `url`, which raises when it fails.

    Raises:
        ConfigError: as for `open_remote_store`.
    """
    if block_bytes < 1:
        raise ConfigError(f"block_bytes={block_bytes!r} is not allowed; it must be at least 1")
    parsed = parse_url(url)
    store = SCHEMES.get(parsed.scheme)
    if store is None:
        raise ConfigError(
            f"remote URL {parsed.shown!r} has the unknown scheme {parsed.scheme!r}; "
            f"allowed are {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        )
    return store.from_url(parsed, block_bytes)
