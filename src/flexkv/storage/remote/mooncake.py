"""Blocks in a Mooncake Store: the pooled memory of its clients, found through a master.

    this process                      client process                    other clients
      caller's buffer --copy-- lane (shared memory) --TCP or RDMA-- segments: blocks of everybody

The client library runs in a process of its own (`mooncake_process.py` says why). `lanes` requests may be under way; a
caller that finds no lane free, or whose lane still owes the answer to a call that ran out of time, waits until its
deadline. A client process that ended, because it crashed or never reached its master, is started again by a later call.
One copy of the payload remains each way, between the caller's buffer and the lane.

Each client lends `segment_mb` of memory to the cluster, and that memory's blocks are gone when it ends.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from flexkv.errors import ConfigError
from flexkv.storage.remote.base import BoolArray, RemoteBackend, RemoteStoreError
from flexkv.storage.remote.mooncake_client import Lane, MooncakeClient
from flexkv.storage.remote.mooncake_wire import ClientConfig, LaneOp, slot_bytes
from flexkv.storage.remote.url import RemoteUrl
from flexkv.storage.remote.value import HEADER_BYTES, is_intact, make_header, value_bytes

PROTOCOLS: Final = ("tcp", "rdma")
_MIB: Final = 2**20
_SMALLEST_LANE: Final = 32 * _MIB
_BLOCKS_PER_LANE: Final = 4
_KEYS_PER_REQUEST: Final = 4096
_RESTART_S: Final = 2.0
"""A client process is not started more often than this."""

# Mooncake's error codes (0.3.13): -2xx no room, -600 an argument, -7xx the object, -8xx its segment, -9xx the master.
_FULL: Final = range(-299, -199)
_LARGER_THAN_SLOT: Final = -600
_IN_FLUX: Final = range(-799, -699)
"""Of a put: another client writes or removes the same key at this moment."""
_MASTER_FAILED: Final = range(-999, -899)
_SEGMENT_FAILED: Final = range(-899, -799)


class MooncakeStore(RemoteBackend):
    """A cluster, reached through a client process that is started with the first call."""

    kind = "mooncake"

    def __init__(self, config: ClientConfig, *, num_lanes: int = 4) -> None:
        """Use a client with `num_lanes` lanes."""
        super().__init__()
        self._config = config
        self._num_lanes = num_lanes
        self._lock = threading.Lock()
        self._client: MooncakeClient | None = None  # this and the following are protected by _lock
        self._started_at = float("-inf")

    @classmethod
    def from_url(cls, url: RemoteUrl, block_bytes: int) -> Self:
        """Open `mooncake://master-host:port`.

        Options: metadata (default P2PHANDSHAKE), protocol, device (RDMA's), local_host (this machine, as the other
        clients reach it), segment_mb, lanes.

        Raises:
            ConfigError: not such a URL, or the Mooncake client is not installed.
        """
        if importlib.util.find_spec("mooncake") is None:
            raise ConfigError(
                "mooncake:// needs the package mooncake-transfer-engine-non-cuda; install kvstrata[mooncake]"
            )
        example = "mooncake://master.local:50051"
        url.require(url.host != "" and url.port is not None, "does not name the master's host and port", example)
        url.require(url.path in ("", "/"), "has a path, which a Mooncake master does not have", example)
        url.require(url.username is None, "names a user, which a Mooncake master does not have", example)
        options = url.options()
        config = ClientConfig(
            master=url.netloc,
            metadata=options.text("metadata") or "P2PHANDSHAKE",
            protocol=options.choice("protocol", "tcp", PROTOCOLS),
            device=options.text("device") or "",
            local_host=options.text("local_host") or "",
            segment_bytes=options.integer("segment_mb", 1024, 0, 2**24) * _MIB,
            lane_bytes=max(_SMALLEST_LANE, _BLOCKS_PER_LANE * slot_bytes(value_bytes(block_bytes))),
        )
        num_lanes = options.integer("lanes", 2, 1, 64)
        options.finish()
        return cls(config, num_lanes=num_lanes)

    def close(self) -> None:
        """See `RemoteStore`. Takes up to 5 s when the client does not leave its cluster by itself."""
        self._closed.set()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _exists(self, keys: Sequence[str], done: BoolArray, deadline: float) -> None:
        for part in _parts([0] * len(keys), self._config.lane_bytes):
            with self._lane(deadline) as lane:
                codes = lane.ask(LaneOp.EXISTS, [keys[i] for i in part], [], deadline)
            _require_master(codes)
            done[part.start : part.stop] = np.asarray(codes) == 1

    def _get(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        sizes = self._sizes(views)
        for part in _parts(sizes, self._config.lane_bytes):
            with self._lane(deadline) as lane:
                codes = lane.ask(LaneOp.GET, [keys[i] for i in part], [sizes[i] for i in part], deadline)
                slots = lane.slots([sizes[i] for i in part])
                for i, code, slot in zip(part, codes, slots, strict=True):
                    done[i] = code == sizes[i] and _copy_value(slot, keys[i], views[i])
                    if (code >= 0 or code == _LARGER_THAN_SLOT) and not done[i]:
                        self._count_bad_value()
            _require_master(codes)

    def _put(self, keys: Sequence[str], views: list[memoryview], done: BoolArray, deadline: float) -> None:
        sizes = self._sizes(views)
        for part in _parts(sizes, self._config.lane_bytes):
            with self._lane(deadline) as lane:
                for i, slot in zip(part, lane.slots([sizes[i] for i in part]), strict=True):
                    slot[:HEADER_BYTES] = np.frombuffer(make_header(keys[i], views[i]), np.uint8)
                    slot[HEADER_BYTES:] = np.frombuffer(views[i], np.uint8)
                codes = lane.ask(LaneOp.PUT, [keys[i] for i in part], [sizes[i] for i in part], deadline)
            done[part.start : part.stop] = np.asarray(codes) == 0
            _require_master(codes)
            failed = [code for code in codes if code < 0 and code not in _FULL and code not in _IN_FLUX]
            if failed:
                raise RemoteStoreError(
                    f"Mooncake has not stored {len(failed)} of {len(codes)} values: error {failed[0]}",
                    is_transient=failed[0] in _SEGMENT_FAILED,
                )

    def _delete(self, keys: Sequence[str], deadline: float) -> None:
        for part in _parts([0] * len(keys), self._config.lane_bytes):
            with self._lane(deadline) as lane:
                codes = lane.ask(LaneOp.DELETE, [keys[i] for i in part], [], deadline)
            _require_master(codes)

    def _ping(self, deadline: float) -> None:
        with self._lane(deadline) as lane:
            _require_master(lane.ask(LaneOp.EXISTS, ["ping"], [], deadline))

    def _sizes(self, views: list[memoryview]) -> list[int]:
        sizes = [value_bytes(view.nbytes) for view in views]
        if slot_bytes(max(sizes)) > self._config.lane_bytes:
            raise RemoteStoreError(
                f"a value of {max(sizes)} bytes is larger than what this store was opened for "
                f"({self._config.lane_bytes} bytes)"
            )
        return sizes

    @contextmanager
    def _lane(self, deadline: float) -> Iterator[Lane]:
        client = self._running_client()
        lane = client.take(deadline)
        try:
            yield lane
        finally:
            client.give_back(lane)

    def _running_client(self) -> MooncakeClient:
        with self._lock:
            if self._closed.is_set():
                raise RemoteStoreError(f"the {self.kind} store is closed")
            if self._client is not None and self._client.is_dead:
                self._client.close(wait_s=0.0)
                self._client = None
            if self._client is None:
                now = time.monotonic()
                if now - self._started_at < _RESTART_S:
                    raise RemoteStoreError(
                        "the Mooncake client process has ended; it will be started again", is_transient=True
                    )
                self._started_at = now
                self._client = MooncakeClient(self._config, self._num_lanes)
            return self._client


def _parts(sizes: Sequence[int], lane_bytes: int) -> Iterator[range]:
    """Cut a batch into runs that fit a lane, and a frame."""
    begin = num_bytes = 0
    for i, size in enumerate(sizes):
        if i > begin and (num_bytes + slot_bytes(size) > lane_bytes or i - begin == _KEYS_PER_REQUEST):
            yield range(begin, i)
            begin, num_bytes = i, 0
        num_bytes += slot_bytes(size)
    yield range(begin, len(sizes))


def _copy_value(slot: npt.NDArray[np.uint8], key: str, payload: memoryview) -> bool:
    """Verify a value in a lane and copy its payload; return whether it is the value of `key`."""
    if not is_intact(slot[:HEADER_BYTES].tobytes(), key, slot[HEADER_BYTES:].data):
        return False
    np.copyto(np.frombuffer(payload, np.uint8), slot[HEADER_BYTES:])
    return True


def _require_master(codes: Sequence[int]) -> None:
    for code in codes:
        if code in _MASTER_FAILED:
            raise RemoteStoreError(f"the Mooncake master does not answer: error {code}", is_transient=True)
