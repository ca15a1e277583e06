"""What ends an engine core process from outside: SIGTERM, and the end of the front end that started it.

    SIGTERM ---- wakeup pipe --->  thread "core-watchdog"   before `attach`: the process exits at once
    stdin ------ end of file --->                           after it: the main loop is stopped, by force after a while

It runs before anything that takes long, imports included: an orphan neither lives on nor leaves its directory behind.
(Linux could send a signal on the parent's death, but does so when the *thread* ends that started the child.) SIGINT is
ignored: a Ctrl-C reaches the whole process group, and the front end decides.
"""

import logging
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_MS = 1000
_EXIT_GRACE_S = 10.0


class CoreWatchdog:
    """Watches from `start` to `finish`. REQUIRES: stdin is a pipe from the front end, with nothing left to read."""

    def __init__(self, runtime_dir: Path) -> None:
        """`runtime_dir` is removed when the front end is gone and cannot do so."""
        self._runtime_dir = runtime_dir
        self._parent = os.getppid()
        self._has_finished = threading.Event()
        self._attaching = threading.Lock()
        self._stop: Callable[[], None] | None = None  # guarded by _attaching

    def start(self) -> None:
        """Begin to watch; to be called in the main thread."""
        wakeup_fd = _install_signal_handlers()
        threading.Thread(target=self._run, args=(wakeup_fd,), name="core-watchdog", daemon=True).start()

    def attach(self, stop: Callable[[], None]) -> None:
        """From now on there is something to release: call `stop`, from the watchdog's thread, instead of exiting."""
        with self._attaching:
            self._stop = stop

    def finish(self) -> None:
        """Everything is released: remove what the front end can no longer remove itself. Idempotent."""
        self._has_finished.set()
        if self._is_orphan():
            shutil.rmtree(self._runtime_dir, ignore_errors=True)

    def _run(self, wakeup_fd: int) -> None:
        poller = _stdin_poller()
        poller.register(wakeup_fd, select.POLLIN)
        while not poller.poll(_POLL_MS) and os.getppid() == self._parent:
            if self._has_finished.is_set():
                return
        # Not worth a line: it follows what somebody did, or a failure that is reported already.
        logger.debug("engine core stops reason=%s", "front-end-gone" if self._is_orphan() else "SIGTERM")
        with self._attaching:
            if self._stop is None:
                self.finish()
                os._exit(0)
        self._stop()
        if not self._has_finished.wait(_EXIT_GRACE_S):
            logger.error("engine core did not stop in time; exits now")
            self.finish()
            os._exit(1)

    def _is_orphan(self) -> bool:
        # The pipe tells at once; asking for the parent as well covers a pipe that a fork of the parent keeps open.
        return bool(_stdin_poller().poll(0)) or os.getppid() != self._parent


def _stdin_poller() -> select.poll:
    poller = select.poll()
    poller.register(sys.stdin.fileno(), select.POLLIN)  # an end of file is readable; a hang-up is always reported
    return poller


def _install_signal_handlers() -> int:
    """Let SIGTERM write to a pipe, which is returned; a Python handler would run in the main thread, amid a step."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return read_fd
