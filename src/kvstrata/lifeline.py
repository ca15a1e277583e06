"""Two small agreements between a supervisor and the servers it starts: when one is ready, and that none outlives it."""

import ctypes
import json
import os
import signal

PR_SET_PDEATHSIG = 1


def exit_with_parent(parent_pid: int) -> None:
    """Have the kernel send this process SIGTERM when its parent dies, also when the parent is killed with -9."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent_pid:  # it died before the call above
        os.kill(os.getpid(), signal.SIGTERM)


def announce_ready(ready_fd: int, port: int) -> None:
    """Tell the supervisor which port is being served, as one JSON line, and close the pipe."""
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(json.dumps({"port": port}) + "\n")
