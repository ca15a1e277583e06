"""Blocks as files of a directory, local or shared by a network file system.

    <dir>/blocks/<namespace>/<fingerprint>/ab/cd/abcd...   one value per file, fanned out by the first bytes of its hash
    <dir>/writing/<random>/                                one per open store: the files it is writing
                           lock                            flock held while that store lives
                           <number>

A value is written in `writing` and renamed into place. Directories in `writing` whose lock is free belong to the dead:
every store that opens removes them. Reads go straight into the caller's buffer, writes straight out of it.

The deadline is looked at before each block. A call into the kernel cannot be given up: on a mount whose server hangs, a
thread is held until the mount itself gives up, so mount with a timeout (NFS: `soft`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from flexkv.errors import ConfigError
from flexkv.storage.remote.base import BoolArray, RemoteBackend, RemoteStoreError, time_left
from flexkv.storage.remote.url import RemoteUrl
from flexkv.storage.remote.value import HEADER_BYTES, is_intact, make_header, value_bytes

_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT: Final = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR, errno.EMFILE})


class PosixStore(RemoteBackend):
    """A directory; the processes of any number of machines may share it."""

    kind = "posix"

    def __init__(self, directory: Path, *, fsync: bool = False) -> None:
        """Use `directory`, which is made if need be; `fsync` makes values survive a loss of power.

        Raises:
            ConfigError: it cannot be written.
        """
        super().__init__()
        self._blocks = directory / "blocks"
        self._fsync = fsync
        self._numbers = itertools.count()
        self._writing = WritingDir(directory / "writing", directory)

    @classmethod
    def from_url(cls, url: RemoteUrl, block_bytes: int) -> Self:
        """Open `file:///dir?fsync=1`.

        Raises:
            ConfigError: not such a URL, or a directory that cannot be written.
        """
        example = "file:///mnt/kv"
        url.require(url.host in ("", "localhost") and url.port is None, "names a host", example)
        url.require(url.path not in ("", "/"), "names no directory", example)
        options = url.options()
        fsync = options.flag("fsync", default=False)
        options.finish()
        return cls(Path(url.path), fsync=fsync)

    def close(self) -> None:
        """See `RemoteStore`."""
        self._closed.set()
        self._writing.close()

    def _exists(self, keys: Sequence[str], done: BoolArray, deadline: float) -> None:
        def look(i: int) -> None:
            done[i] = stat.S_ISREG(os.stat(self._path(keys[i])).st_mode)

        _for_each(len(keys), look, deadline)

    def _get(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        def read(i: int) -> None:
            # A pipe or device that somebody put there must not hold us: opening does not wait, reading is for files.
            fd = os.open(self._path(keys[i]), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                done[i] = _read_value(fd, keys[i], views[i])
            finally:
                os.close(fd)
            if not done[i]:
                self._count_bad_value()

        _for_each(len(keys), read, deadline)

    def _put(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        def write(i: int) -> None:
            done[i] = self._write(keys[i], views[i])

        _for_each(len(keys), write, deadline, harmless=frozenset())

    def _delete(self, keys: Sequence[str], deadline: float) -> None:
        _for_each(len(keys), lambda i: os.unlink(self._path(keys[i])), deadline)

    def _ping(self, deadline: float) -> None:
        if not self._writing.is_held():
            raise RemoteStoreError(f"{str(self._blocks)!r} has lost the directory this store writes in")

    def _path(self, key: str) -> str:
        prefix, block_hash = key.rsplit("/", 1)
        return f"{self._blocks}/{prefix}/{block_hash[:2]}/{block_hash[2:4] or '_'}/{block_hash}"

    def _write(self, key: str, payload: memoryview) -> bool:
        """Write a value and rename it into place; False when there is no room."""
        target = self._path(key)
        temporary = self._writing.path(next(self._numbers))
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                _write_all(fd, [memoryview(make_header(key, payload)), payload])
                if self._fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            self._rename(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if error.errno in _FULL:
                return False
            raise
        return True

    def _rename(self, temporary: str, target: str) -> None:
        try:
            os.rename(temporary, target)
        except FileNotFoundError:  # the first block of its directory
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.rename(temporary, target)
        if self._fsync:
            fd = os.open(os.path.dirname(target), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


class WritingDir:
    """The directory in which one open store writes; removes those of stores that are dead."""

    def __init__(self, parent: Path, shown: Path) -> None:
        """Make a directory in `parent`; errors speak of `shown`.

        Raises:
            ConfigError: it cannot be made or written.
        """
        self._lock_fd = -1
        try:
            parent.mkdir(parents=True, exist_ok=True)
            (parent.parent / "blocks").mkdir(exist_ok=True)
            while self._lock_fd < 0:
                self._directory = parent / secrets.token_hex(8)
                self._directory.mkdir()
                self._lock_fd = _lock(self._directory)  # a store that opens meanwhile may take it for a dead one's
            with tempfile.TemporaryFile(dir=self._directory) as probe:
                probe.write(b"\0")
        except OSError as error:
            self.close()
            raise ConfigError(f"remote directory {str(shown)!r} cannot be written: {error.strerror}") from error
        self._sweep(parent)

    def path(self, number: int) -> str:
        """Return the name of a temporary file."""
        return f"{self._directory}/{number}"

    def is_held(self) -> bool:
        """Return whether the directory is still there and ours."""
        return self._lock_fd >= 0 and _is_same_file(self._lock_fd, self._directory / "lock")

    def close(self) -> None:
        """Remove the directory. Idempotent."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(fd)

    def _sweep(self, parent: Path) -> None:
        for directory in parent.iterdir():
            if directory == self._directory:
                continue
            fd = _lock(directory)
            if fd >= 0:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(fd)


def _lock(directory: Path) -> int:
    """Lock a writing directory; return the lock's descriptor, or -1 when another holds it or it is gone."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _ABSENT or error.errno == errno.EACCES:  # another user's: not ours to judge
            return -1
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same_file(fd, directory / "lock"):
            return fd
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _for_each(num_keys: int, act: Callable[[int], None], deadline: float, harmless: frozenset[int] = _ABSENT) -> None:
    """Do all of a batch. Errors that are not harmless are raised at the end, as they may concern one file only."""
    failure: OSError | None = None
    for i in range(num_keys):
        time_left(deadline)
        try:
            act(i)
        except OSError as error:
            if error.errno not in harmless:
                failure = failure or error
    if failure is not None:
        raise RemoteStoreError(str(failure), is_transient=failure.errno in _TRANSIENT) from failure


def _read_value(fd: int, key: str, payload: memoryview) -> bool:
    """Read a file into `payload`; return whether it is the value of `key`."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != value_bytes(payload.nbytes):
        return False
    header = bytearray(HEADER_BYTES)
    parts = [memoryview(header), payload]
    while parts:
        count = os.readv(fd, parts)
        if count == 0:
            return False
        parts = _after(parts, count)
    return is_intact(header, key, payload)


def _write_all(fd: int, parts: list[memoryview]) -> None:
    while parts:
        parts = _after(parts, os.writev(fd, parts))


def _after(parts: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `parts` after their first `count` bytes."""
    left = []
    for part in parts:
        skipped = min(count, part.nbytes)
        count -= skipped
        if skipped < part.nbytes:
            left.append(part[skipped:])
    return left
