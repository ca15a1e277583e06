"""Starting the engine core process, and what the front end holds of it."""

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

import msgspec

from folovllm.engine.arg_utils import EngineArgs

CORE_MODULE = "folovllm.engine.core_proc"
_EXIT_TIMEOUT_S = 10.0


class CoreProcess:
    """A child process with the interface of multiprocessing.Process, over subprocess.

    A fresh interpreter needs no `if __name__ == "__main__"` in the user's script, and inherits no state of the parent.
    """

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid
        self.sentinel = os.pidfd_open(popen.pid)
        """A file descriptor that becomes readable when the process has ended; closed by `close`."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        return self._popen.poll()

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def join(self, timeout: float | None = None) -> bool:
        """Wait for its end, up to `timeout` seconds; whether it has ended."""
        wait_ms = None if timeout is None else int(timeout * 1000)
        poller = select.poll()
        poller.register(self.sentinel, select.POLLIN)
        return bool(poller.poll(wait_ms)) and self._popen.wait() is not None

    def terminate(self) -> None:
        """Ask it to stop (SIGTERM)."""
        self._popen.terminate()

    def kill(self) -> None:
        """Stop it at once (SIGKILL)."""
        self._popen.kill()

    def close(self) -> None:
        """Release the descriptors. REQUIRES: it has ended; idempotent."""
        if self.sentinel >= 0:
            self._popen.wait()
            os.close(self.sentinel)
            self.sentinel = -1


class EngineCoreHandle:
    """A started core process and the endpoints at which it expects its front end, which binds both.

    The endpoints are sockets in a private directory (0700) that goes with `close`.
    """

    def __init__(self, args: EngineArgs, module: str = CORE_MODULE) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="folovllm-"))
        self.input_endpoint = f"ipc://{self.runtime_dir}/input"
        self.output_endpoint = f"ipc://{self.runtime_dir}/output"
        command = [sys.executable, "-m", module, "--input", self.input_endpoint, "--output", self.output_endpoint]
        # The child finds what the parent finds, a connector named by the user included.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        try:
            self._popen = subprocess.Popen(
                [*command, "--runtime-dir", str(self.runtime_dir)], stdin=subprocess.PIPE, env=env
            )
            self.process = CoreProcess(self._popen)
        except OSError:
            shutil.rmtree(self.runtime_dir, ignore_errors=True)
            raise
        self._send_args(args)

    def close(self, timeout_s: float = _EXIT_TIMEOUT_S) -> None:
        """Stop the process, gracefully, then by force, and remove the sockets; idempotent."""
        if self.process.sentinel >= 0:
            self._close_lifeline()
            for insist in (self.process.terminate, self.process.kill):
                if self.process.join(timeout_s):
                    break
                insist()
            self.process.close()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _send_args(self, args: EngineArgs) -> None:
        # The pipe stays open afterwards: its end tells the child that this process is gone.
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; the sentinel tells
            self._popen.stdin.write(msgspec.json.encode(args) + b"\n")
            self._popen.stdin.flush()

    def _close_lifeline(self) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before it read its arguments
            self._popen.stdin.close()


def start_engine_core(args: EngineArgs, module: str = CORE_MODULE) -> EngineCoreHandle:
    """Start a core process; bind its endpoints, then wait for CoreReady or CoreDied.

    `module` is what `python -m` runs: `folovllm.engine.core_proc`, or one with the same command line.

    Raises:
        OSError: the process cannot be started.
    """
    return EngineCoreHandle(args, module)
