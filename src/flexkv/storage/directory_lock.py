"""The lock of a directory that holds a store: one process at a time.

An flock on `<directory>/lock`, which the kernel gives up with the process, also after kill -9. The file's text is the
holder's pid, for whoever is refused.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Self

from flexkv.errors import ConfigError

LOCK_NAME: Final = "lock"
_PID_CHARS: Final = 10


class DirectoryLock:
    """Held from construction until `close`, which is idempotent."""

    def __init__(self, directory: Path) -> None:
        """Take the lock of an existing directory.

        Raises:
            ConfigError: another process has it, or the directory cannot be written.
        """
        self._fd = -1
        try:
            fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot use the SSD directory {str(directory)!r}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(fd, f"{os.getpid():<{_PID_CHARS}}\n".encode(), 0)  # one write: never half a pid
        except BlockingIOError as error:
            holder = os.pread(fd, _PID_CHARS, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise ConfigError(
                f"the SSD directory {str(directory)!r} is in use by process {holder}; give each store its own"
            ) from error
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"cannot lock the SSD directory {str(directory)!r}: {error.strerror}") from error
        self._fd = fd

    def close(self) -> None:
        """Give the lock up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
