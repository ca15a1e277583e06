"""An engine's event side for tests: real sockets, and full control over what is sent, lost and replayed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zmq

from kvblocks.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, KVEventBatch, encode_batch

END = b"\xff" * 8
_DEADLINE_MS = 10_000


def batch(*events: KVEvent, rank: int | None = 0) -> bytes:
    return encode_batch(KVEventBatch(ts=1.0, events=list(events), data_parallel_rank=rank))


def tokens(num_blocks: int, block_size: int = 16, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50_000, num_blocks * block_size).tolist()


def stored(
    hashes: Sequence[int],
    token_ids: Sequence[int],
    parent: int | None = None,
    *,
    block_size: int = 16,
    **fields: object,
) -> BlockStored:
    return BlockStored(list(hashes), parent, list(token_ids), block_size, medium=fields.pop("medium", "GPU"), **fields)


def removed(*hashes: int, medium: str | None = "GPU") -> BlockRemoved:
    return BlockRemoved(list(hashes), medium=medium)


def cleared() -> AllBlocksCleared:
    return AllBlocksCleared()


class Engine:
    """Publishes numbered payloads on a PUB socket and answers replays from all it was ever given."""

    def __init__(self, topic: str = "kv@pod-a@m", endpoint: str = "tcp://127.0.0.1:*", replay: bool = True) -> None:
        self.topic = topic.encode()
        self.next_seq = 0
        self.history: list[tuple[int, bytes]] = []
        self.replay_starts: list[int] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # XPUB tells when a subscriber has come, so that nothing is sent into the void.
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._pub.bind(endpoint)
        self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay_endpoint: str | None = None
        self._thread: threading.Thread | None = None
        if replay:
            router = self._context.socket(zmq.ROUTER)
            router.bind("tcp://127.0.0.1:*")
            self.replay_endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
            self._stop = self._context.socket(zmq.PAIR)
            self._stop.bind("inproc://stop")
            self._thread = threading.Thread(target=self._serve_replays, args=(router,), daemon=True)
            self._thread.start()

    def wait_for_subscriber(self) -> None:
        subscription = b""
        while subscription[:1] != b"\x01":  # others say that somebody left
            assert self._pub.poll(_DEADLINE_MS), "no subscriber came"
            subscription = self._pub.recv()

    def send(self, payload: bytes, *, lost: bool = False, forgotten: bool = False, seq: int | None = None) -> int:
        """Publish a payload: `lost` ones reach nobody, `forgotten` ones are not replayed either."""
        if seq is None:
            seq = self.next_seq
        self.next_seq = seq + 1
        if not forgotten:
            self.history.append((seq, payload))
        if not lost:
            self._pub.send_multipart((self.topic, seq.to_bytes(8, "big"), payload))
        return seq

    def send_raw(self, *frames: bytes) -> None:
        self._pub.send_multipart(frames)

    def restart(self) -> None:
        """Begin a new generation, numbered from 0, on the same sockets."""
        self.next_seq = 0
        self.history = []

    def close(self) -> None:
        if self._thread is not None:
            self._stop.send(b"")
            self._thread.join(10)
        self._context.destroy(linger=0)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _serve_replays(self, router: zmq.Socket[bytes]) -> None:
        stop = self._context.socket(zmq.PAIR)
        stop.connect("inproc://stop")
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(stop, zmq.POLLIN)
        with router, stop:
            while stop not in (ready := dict(poller.poll())):
                assert router in ready
                client, _, start = router.recv_multipart()
                start_seq = int.from_bytes(start, "big")
                for seq, payload in list(self.history):
                    if seq >= start_seq:
                        router.send_multipart((client, b"", self.topic, seq.to_bytes(8, "big"), payload))
                self.replay_starts.append(start_seq)
                router.send_multipart((client, b"", b"", END, b""))
