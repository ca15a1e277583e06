"""The client of an engine's replay socket: fetches the batches that a subscriber missed.

The messages are drawn in `kvblocks.publisher`; older engines leave the topic frame out of their answers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import zmq

from kvblocks.errors import KVBlocksError, ReplayError, ReplayTimeoutError
from kvblocks.publisher import END_SEQUENCE

# Enough for ten times the default buffer of an engine: its ROUTER drops answers that we do not take off its hands.
_MAX_QUEUED_FRAMES = 100_000


@dataclass(frozen=True, slots=True)
class ReplayedFrame:
    """One batch as it was published; `payload` is for `kvblocks.events.decode_batch`, `topic` empty if not told."""

    seq: int
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What an engine still had, ascending by sequence number.

    `complete` is False when history is lost: the frames do not begin at the sequence asked for, or leave one out. An
    answer without frames is complete as far as the engine knows: it has published nothing from `start_seq` on.
    """

    start_seq: int
    frames: tuple[ReplayedFrame, ...]
    complete: bool


class ReplayClient:
    """Asks one engine for past batches; holds no connection between requests, so any thread may use it."""

    def __init__(self, endpoint: str, timeout_s: float = 5.0) -> None:
        """Name the engine's replay `endpoint`, and how long one whole replay may take.

        Raises:
            KVBlocksError: a timeout that is not positive.
        """
        if timeout_s <= 0:
            raise KVBlocksError(f"timeout_s is above 0, not {timeout_s}")
        self._endpoint = endpoint
        self._timeout_s = timeout_s

    def replay(self, start_seq: int) -> ReplayResult:
        """Fetch all batches from `start_seq` on that the engine still has.

        Raises:
            ReplayTimeoutError: the answer was not complete in time.
            KVBlocksError: a negative `start_seq`.
            ReplayError: the endpoint is no address, or the answer is not of the replay protocol.
        """
        if start_seq < 0:
            raise KVBlocksError(f"start_seq is at least 0, not {start_seq}")
        deadline = time.monotonic() + self._timeout_s
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        # A socket of its own, so that late answers to an earlier request cannot be taken for this one's.
        with context.socket(zmq.DEALER) as dealer:
            dealer.set_hwm(_MAX_QUEUED_FRAMES)
            dealer.setsockopt(zmq.LINGER, 0)
            try:
                dealer.connect(self._endpoint)
            except zmq.ZMQError as error:
                raise ReplayError(f"cannot connect to the replay endpoint {self._endpoint!r}: {error}") from error
            self._wait(dealer, zmq.POLLOUT, deadline, 0)
            dealer.send_multipart((b"", start_seq.to_bytes(8, "big")))
            frames: list[ReplayedFrame] = []
            while True:
                self._wait(dealer, zmq.POLLIN, deadline, len(frames))
                frame = _parse(dealer.recv_multipart())
                if frame is None:
                    return ReplayResult(start_seq, tuple(frames), _is_complete(start_seq, frames))
                if frames and frame.seq <= frames[-1].seq:
                    raise ReplayError(f"replay of {self._endpoint!r} goes back from {frames[-1].seq} to {frame.seq}")
                if frame.seq >= start_seq:
                    frames.append(frame)

    def _wait(self, dealer: zmq.Socket[bytes], event: int, deadline: float, num_frames: int) -> None:
        remaining_ms = max(0, int((deadline - time.monotonic()) * 1000))
        if not dealer.poll(remaining_ms, event):
            raise ReplayTimeoutError(
                f"no end of replay from {self._endpoint!r} within {self._timeout_s} s ({num_frames} frames came)"
            )


def _parse(message: list[bytes]) -> ReplayedFrame | None:
    """Return the frame of one answer, None for the end marker."""
    if len(message) not in (3, 4) or message[0] or len(message[-2]) != 8:
        sizes = [len(part) for part in message]
        raise ReplayError(f"not a replay answer ['', topic, 8-byte sequence, payload]: parts of {sizes} bytes")
    if message[-2] == END_SEQUENCE:
        return None
    topic = message[1].decode(errors="replace") if len(message) == 4 else ""
    return ReplayedFrame(int.from_bytes(message[-2], "big"), topic, message[-1])


def _is_complete(start_seq: int, frames: list[ReplayedFrame]) -> bool:
    return not frames or frames[-1].seq - start_seq + 1 == len(frames)
