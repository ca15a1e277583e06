"""Whose message is it: the frames of engines and the names in their topics.

    topic | sequence (u64 big-endian) | payload (msgpack batch)        vLLM, SGLang, folovllm and flexkv alike

The payload stays encoded here; both of its layouts are read by the index's event applier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["EventMessage", "parse_message", "parse_topic"]

_TOPIC_PREFIX: Final = "kv@"
_SEQUENCE_BYTES: Final = 8
MAX_SEQUENCE: Final = 2**63 - 1
"""Highest sequence number that counts as one; the all-ones number ends a replay."""


@dataclass(frozen=True, slots=True)
class EventMessage:
    """One message of a publisher.

    Attributes:
        topic: its first frame as text.
        seq: its number, from 0 per publisher process.
        payload: the encoded batch.
    """

    topic: str
    seq: int
    payload: bytes


def parse_message(frames: Sequence[bytes]) -> EventMessage | None:
    """Return the message in three ZMQ frames, None if they are not one."""
    if len(frames) != 3 or len(frames[1]) != _SEQUENCE_BYTES:
        return None
    seq = int.from_bytes(frames[1], "big")
    if seq > MAX_SEQUENCE:
        return None
    return EventMessage(frames[0].decode(errors="replace"), seq, frames[2])


def parse_topic(topic: str) -> tuple[str, str]:
    """Return (pod, model) of a topic `kv@<pod>@<model>`; of any other topic, the whole of it as pod and no model."""
    if topic.startswith(_TOPIC_PREFIX):
        pod, separator, model = topic[len(_TOPIC_PREFIX) :].partition("@")
        if pod and separator:
            return pod, model
    return topic, ""
