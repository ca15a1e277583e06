"""The data files of the SSD tier: one per directory, preallocated, striped by slot.

    <directory 0>/blocks-0-of-2.bin   | slot 0 | slot 2 | slot 4 | ...    slot s: file s % 2, offset s // 2 * slot_bytes
    <directory 1>/blocks-1-of-2.bin   | slot 1 | slot 3 | slot 5 | ...    slot = block, padded to a multiple of 4096

Directories on different disks share the load. All room is taken at the start: a disk that is full says so then.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from flexkv.common.config import SECTOR_BYTES
from flexkv.errors import ConfigError

_PREFIX: Final = "blocks-"

Allocate = Callable[[int, int, int], None]
"""Takes (descriptor, offset, length) and reserves room on disk, as `os.posix_fallocate` does."""


class SsdFiles:
    """The files of one tier, all there and of full size. They are opened by those who read and write them.

    Attributes:
        paths: one per directory, in their order.
        num_slots: slots over all files.
        slot_bytes: bytes of one slot on disk.
        has_new: a file was not there before, or had another size: what an index says about it is not to be believed.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        num_slots: int,
        block_bytes: int,
        allocate: Allocate = os.posix_fallocate,
    ) -> None:
        """Make the files that are missing, and reserve their room. REQUIRES: the directories exist, and are locked.

        Raises:
            ConfigError: no directories, the same one twice, fewer slots than files, files of another set of
                directories, not enough room, or no permission. New files are removed again.
        """
        if not directories:
            raise ConfigError("the SSD tier needs at least one directory")
        if len({path.resolve() for path in directories}) != len(directories):
            raise ConfigError(f"an SSD directory is named twice: {', '.join(map(str, directories))}")
        if num_slots < len(directories):
            raise ConfigError(
                f"the SSD tier has room for {num_slots} blocks of {block_bytes} bytes; it needs at least one in each "
                f"of its {len(directories)} directories"
            )
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes(block_bytes)
        count = len(directories)
        self.paths = [directory / f"{_PREFIX}{i}-of-{count}.bin" for i, directory in enumerate(directories)]
        self.has_new = False
        self._allocate = allocate
        created: list[Path] = []
        try:
            for i, path in enumerate(self.paths):
                _refuse_strangers(path)
                self._prepare(path, (num_slots + count - 1 - i) // count * self.slot_bytes, created)
        except BaseException:
            for path in created:
                path.unlink(missing_ok=True)
            raise

    def _prepare(self, path: Path, num_bytes: int, created: list[Path]) -> None:
        try:
            exists = path.exists()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot make {str(path)!r}: {error.strerror}") from error
        try:
            if not exists:
                created.append(path)
            if os.fstat(fd).st_size != num_bytes:
                self.has_new = True
                os.ftruncate(fd, 0)
                _check_room(path, num_bytes)
            self._allocate(fd, 0, num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_room(path, num_bytes, os.strerror(error.errno)) from error
            raise ConfigError(f"cannot reserve {num_bytes} bytes in {str(path)!r}: {error.strerror}") from error
        finally:
            os.close(fd)


def slot_bytes(block_bytes: int) -> int:
    """Return the bytes a block takes on disk."""
    return -(-block_bytes // SECTOR_BYTES) * SECTOR_BYTES


def num_slots_for(num_bytes: int, block_bytes: int) -> int:
    """Return how many blocks fit into so many bytes of disk.

    Raises:
        ConfigError: not even one.
    """
    count = num_bytes // slot_bytes(block_bytes)
    if count < 1:
        raise ConfigError(
            f"an SSD tier of {num_bytes} bytes is smaller than one block, which takes {slot_bytes(block_bytes)} there"
        )
    return count


def remove_files(directory: Path) -> None:
    """Remove the data files of a directory. REQUIRES: it is locked."""
    for path in directory.glob(f"{_PREFIX}*.bin"):
        path.unlink(missing_ok=True)


def _refuse_strangers(path: Path) -> None:
    """Files of an earlier set of directories would take room that nobody accounts for."""
    strangers = [other.name for other in path.parent.glob(f"{_PREFIX}*.bin") if other.name != path.name]
    if strangers:
        raise ConfigError(
            f"the SSD directory {str(path.parent)!r} belongs to another set of directories ({strangers[0]}, not "
            f"{path.name}); give them in their old order, or run `kvstrata flexkv clear {path.parent}`"
        )


def _check_room(path: Path, num_bytes: int) -> None:
    # Asked beforehand: reserving more than there is fills the disk before it fails.
    if shutil.disk_usage(path.parent).free < num_bytes:
        raise _no_room(path, num_bytes, "not enough room")


def _no_room(path: Path, num_bytes: int, why: str) -> ConfigError:
    free = shutil.disk_usage(path.parent).free
    return ConfigError(
        f"the SSD tier needs {num_bytes} bytes in {str(path.parent)!r}, {free} are free there ({why}); make it smaller"
    )
