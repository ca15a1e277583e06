"""The process that holds the Mooncake client; run as a module, by `mooncake.py` only.

The client library blocks for tens of seconds when its master does not answer, brings its own signal handlers, a Go
runtime and dozens of threads, and writes to stderr. Here it can do all that without a deadline, a Ctrl-C or a crash of
the serving process being touched by it.

    main thread      waits for the end of the control socket, then leaves the cluster and exits
    starter          joins the cluster, then starts a thread per lane
    lane threads     one request after another
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from flexkv.common.memory_handle import SharedMemory
from flexkv.storage.remote.mooncake_wire import (
    HELLO_ID,
    ClientConfig,
    FrameReader,
    LaneOp,
    LaneReply,
    LaneRequest,
    frame,
    slot_offsets,
)

logger = logging.getLogger(__name__)

_RECEIVE_S: Final = 10.0
"""How long to wait for the memory, which was sent before this process was started."""

_LIBRARY_SETTINGS: Final = {"MC_LOG_LEVEL": "ERROR", "MC_RPC_TIMEOUT_MS": "10000", "MC_STORE_CLIENT_SETUP_RETRIES": "3"}
"""Read by the library from the environment when it is loaded; what the user has set there stays."""
_LEAVE_S: Final = 3.0
"""How long leaving the cluster may take; the master notices by itself later."""


class ClientProcess:
    """One process: one client, its memory and its lanes."""

    def __init__(self, config: ClientConfig) -> None:
        """Take over the descriptors of `config`."""
        self._config = config
        self._control = socket.socket(fileno=config.control_fd)
        self._control.settimeout(_RECEIVE_S)
        self._memory = SharedMemory.receive(self._control, config.lane_bytes * len(config.lane_fds))
        self._control.settimeout(None)
        self._lanes = [socket.socket(fileno=fd) for fd in config.lane_fds]
        self._store: Any = None  # set once, by the starter

    def run(self) -> None:
        """Serve until the parent lets go of the control socket or dies; does not return."""
        threading.Thread(target=self._join_cluster, daemon=True).start()
        self._control.recv(1)
        if self._store is not None and self._config.segment_bytes:  # else it holds nothing that others may ask for
            leaving = threading.Thread(target=self._store.close, daemon=True)
            leaving.start()
            leaving.join(_LEAVE_S)
        os._exit(0)  # its threads, which may hang in the library, end with it

    def _join_cluster(self) -> None:
        from mooncake.store import MooncakeDistributedStore

        config = self._config
        store = MooncakeDistributedStore()
        code = store.setup(
            config.local_host or _address_towards(config.master),
            config.metadata,
            config.segment_bytes,
            config.lane_bytes,
            config.protocol,
            config.device,
            config.master,
        )
        if code == 0:
            code = store.register_buffer(self._memory.address, self._memory.size)
        if code != 0:
            logger.error("cannot join the Mooncake cluster master=%s code=%d", config.master, code)
            os._exit(1)
        self._store = store
        for i, lane in enumerate(self._lanes):
            threading.Thread(target=self._serve, args=(i, lane), daemon=True).start()

    def _serve(self, index: int, lane: socket.socket) -> None:
        address = self._memory.address + index * self._config.lane_bytes
        frames = FrameReader(lane)
        decoder = msgspec.msgpack.Decoder(LaneRequest)
        with contextlib.suppress(OSError):  # the parent has gone; the main thread notices too
            lane.sendall(frame(LaneReply(HELLO_ID, [])))
            while (body := frames.read()) is not None:
                request = decoder.decode(body)
                lane.sendall(frame(LaneReply(request.request_id, self._answer(request, address))))

    def _answer(self, request: LaneRequest, address: int) -> list[int]:
        keys = request.keys
        addresses = [address + offset for offset in slot_offsets(request.sizes)]
        codes: Sequence[int]
        match request.op:
            case LaneOp.EXISTS:
                codes = self._store.batch_is_exist(keys)
            case LaneOp.GET:
                codes = self._store.batch_get_into(keys, addresses, request.sizes)
            case LaneOp.PUT:  # the batch call named put keeps the old value of a key
                codes = self._store.batch_upsert_from(keys, addresses, request.sizes)
            case LaneOp.DELETE:  # by force: without it, what was read in the last seconds stays
                codes = self._store.batch_remove(keys, True)
        return list(codes)


def _address_towards(master: str) -> str:
    """Return the address of this machine that packets to the master carry."""
    host, _, port = master.rpartition(":")
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(address)  # of a datagram socket: sends nothing
        name: str = sock.getsockname()[0]
        return name


def main() -> None:
    """Run with a `ClientConfig` in JSON as the only argument."""
    for name, value in _LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    ClientProcess(msgspec.json.decode(sys.argv[1], type=ClientConfig)).run()


if __name__ == "__main__":
    main()
