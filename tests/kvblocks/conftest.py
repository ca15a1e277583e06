from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

VECTORS = Path(__file__).parents[1] / "vectors"
DEADLINE_MS = 10_000


@pytest.fixture
def vectors() -> Path:
    """The folder of what other systems computed and published."""
    return VECTORS


class Subscriber:
    """A SUB socket that is known to receive before a test goes on."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVTIMEO, DEADLINE_MS)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.subscribe(b"")
        self.socket.connect(endpoint.replace("0.0.0.0", "127.0.0.1"))

    def recv(self) -> tuple[bytes, int, bytes]:
        """Return topic, sequence number and payload of the next message."""
        topic, seq, payload = self.socket.recv_multipart()
        assert len(seq) == 8
        return topic, int.from_bytes(seq, "big"), payload

    def recv_until_seq(self, last: int) -> list[int]:
        """Return the sequence numbers received, up to `last`."""
        seqs = []
        while not seqs or seqs[-1] < last:
            seqs.append(self.recv()[1])
        return seqs


@pytest.fixture
def subscribers() -> Iterator[type[Subscriber]]:
    """Make subscribers that are closed at the end of the test."""
    made: list[Subscriber] = []

    class Tracked(Subscriber):
        def __init__(self, endpoint: str) -> None:
            super().__init__(endpoint)
            made.append(self)

    yield Tracked
    for subscriber in made:
        subscriber.socket.close()
