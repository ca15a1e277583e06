"""The private directory of one store: its sockets, and the lock that says it is alive.

<root>/                     0700, ours
  flexkv-<16 hex digits>/   0700, one per store; the digits are derived from its key
    lock                    flock held by the store's process
    device.sock pool.sock
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import Final

from flexkv.errors import ConfigError

_PREFIX: Final = "flexkv-"
_MAX_SOCKET_PATH: Final = 107
"""Longest path of a unix socket on Linux, in bytes."""


def store_dir(root: Path, key: str) -> Path:
    """Return the directory of the store named `key`, which both the store and its device workers derive.

    Raises:
        ConfigError: the path is too long for a socket.
    """
    path = root / f"{_PREFIX}{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if len(os.fsencode(path / "device.sock")) > _MAX_SOCKET_PATH:
        raise ConfigError(f"runtime_dir={str(root)!r} is too long: sockets have paths of at most {_MAX_SOCKET_PATH}")
    return path


def store_name(store_key: str, dp_client_id: int) -> str:
    """Return the key of the store of one data-parallel rank of an engine."""
    return f"{store_key}/dp{dp_client_id}"


def device_socket(directory: Path) -> str:
    """Return the ZMQ address at which a store speaks with its device workers."""
    return f"ipc://{directory / 'device.sock'}"


def pool_socket(directory: Path) -> str:
    """Return the path of the unix socket over which a store hands out its memory pool."""
    return str(directory / "pool.sock")


def ensure_private(directory: Path) -> None:
    """Make a directory only this user can enter, or check that it is one.

    Raises:
        ConfigError: it belongs to somebody else, or others may enter.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ConfigError(f"cannot make the runtime directory {directory}: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"the runtime directory {directory} must be a directory of this user with mode 0700")


class StoreDir:
    """A store's directory, claimed. `close` removes it; a killed store's is removed by the next that starts."""

    def __init__(self, root: Path, key: str) -> None:
        """Claim the directory of `key` below `root`, and sweep those of stores that are dead.

        Raises:
            ConfigError: another live store has it, or it cannot be made private.
        """
        ensure_private(root)
        _sweep(root)
        self.path = store_dir(root, key)
        ensure_private(self.path)
        lock_fd = _try_lock(self.path)
        if lock_fd is None:
            raise ConfigError(
                f"another store is running for {key!r} (it holds {self.path / 'lock'}); give each engine its own "
                "engine_id"
            )
        self._lock_fd: int | None = lock_fd

    def close(self) -> None:
        """Remove the directory and give up the claim. Idempotent."""
        if self._lock_fd is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = None


def _try_lock(directory: Path) -> int | None:
    """Lock a store's directory; None while somebody else has it."""
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:  # swept between making and locking it; its owner will say so
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever swept the directory meanwhile has left us a lock on a file that is gone.
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _sweep(root: Path) -> None:
    for directory in root.glob(f"{_PREFIX}*"):
        # Without a lock file it may be in the making.
        if (directory / "lock").exists() and (lock_fd := _try_lock(directory)) is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(directory)
            os.close(lock_fd)
