"""The storage of one SSD tier, opened and closed as a whole: locks, index, files.

<directory 0>/  lock  index.sqlite (-wal, -shm)  blocks-0-of-F.bin
<directory i>/  lock                             blocks-i-of-F.bin
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from flexkv.common.config import Durability
from flexkv.errors import ConfigError
from flexkv.storage.directory_lock import DirectoryLock
from flexkv.storage.ssd_files import SsdFiles, remove_files
from flexkv.storage.ssd_index import SsdIndex, read_meta, remove_index

logger = logging.getLogger(__name__)


class SsdStore:
    """Owns the directories of one SSD tier until `close`, which is idempotent.

    Attributes:
        files: the data files; `_native.SsdTransfer` opens their paths.
        index: the rows; used by one thread at a time.
        durability: what stored blocks survive; for POWER, sync the transfer before inserting rows.
        block_bytes: bytes of one block.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        num_slots: int,
        block_bytes: int,
        fingerprint: Mapping[str, str],
        durability: Durability = Durability.PROCESS,
    ) -> None:
        """Lock the directories (made if missing), open or make the index and the files.

        `fingerprint` says what the blocks are; their size and number, and the number of directories are added to it.

        Raises:
            ConfigError: a directory is in use, not writable, or full; or it holds blocks of something else.
        """
        self.block_bytes = block_bytes
        self.durability = durability
        full = {
            **fingerprint,
            "block_bytes": str(block_bytes),
            "num_slots": str(num_slots),
            "num_directories": str(len(directories)),
        }
        with contextlib.ExitStack() as stack:
            # Locked in one order everywhere, the same directory not twice: SsdFiles says what is wrong with that.
            for directory in sorted({path.resolve() for path in directories}):
                _make(directory)
                stack.enter_context(DirectoryLock(directory))
            if not directories:
                raise ConfigError("the SSD tier needs at least one directory")
            self.index = stack.enter_context(contextlib.closing(SsdIndex(directories[0], full, durability)))
            self.files = self._open_files(directories, num_slots)
            if self.files.has_new and self.index.num_blocks > 0:
                logger.warning("SSD data files are missing or resized, starting cold directories=%s", directories)
                self.index.clear()
            self.index.set_directories([str(path.resolve()) for path in directories])
            self._stack = stack.pop_all()

    def _open_files(self, directories: Sequence[Path], num_slots: int) -> SsdFiles:
        try:
            return SsdFiles(directories, num_slots, self.block_bytes)
        except ConfigError:
            if (
                self.index.is_new
            ):  # else the next attempt, with another size, would be told that it differs from this one
                self.index.close()
                remove_index(directories[0])
            raise

    def close(self) -> None:
        """Close the index and give the directories up. REQUIRES: no transfer is running."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reopen_store(directory: Path) -> SsdStore:
    """Open the tier whose index is in a directory, with the fingerprint it has; for tools.

    Raises:
        ConfigError: there is none, or it is in use.
    """
    fingerprint, directories = read_meta(directory)
    try:
        block_bytes, num_slots = int(fingerprint.pop("block_bytes")), int(fingerprint.pop("num_slots"))
        fingerprint.pop("num_directories")
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the index in {str(directory)!r} names no {error}") from error
    return SsdStore(directories or [directory], num_slots, block_bytes, fingerprint)


def clear_store(directory: Path) -> list[Path]:
    """Remove all that a tier keeps, in every directory its index names; return those directories.

    Without a readable index only this directory is emptied.

    Raises:
        ConfigError: one is in use, or cannot be written.
    """
    try:
        _, directories = read_meta(directory)
    except ConfigError:
        directories = []
    targets = sorted({directory.resolve(), *(path.resolve() for path in directories if path.is_dir())})
    with contextlib.ExitStack() as locks:
        for target in targets:
            locks.enter_context(DirectoryLock(target))
        for target in targets:
            try:
                remove_index(target)
                remove_files(target)
            except OSError as error:
                raise ConfigError(f"cannot empty {str(target)!r}: {error.strerror}") from error
    return targets


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the SSD directory {str(directory)!r}: {error.strerror}") from error
