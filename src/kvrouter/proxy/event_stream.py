"""Server-sent events, as far as the proxy must know them: where one ends."""

from __future__ import annotations

from typing import Final

MAX_HELD_BYTES: Final = 1024 * 1024
"""An event longer than this goes on in parts."""

_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventBuffer:
    """Bytes in, the same bytes out, cut at the ends of events."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        """Begin between two events."""
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return what has come so far up to the end of the last whole event; the rest is held."""
        data = self._held + chunk if self._held else chunk
        if data.endswith(_ENDS):
            self._held = b""
            return data
        end = max(at + len(mark) if (at := data.rfind(mark)) >= 0 else 0 for mark in _ENDS)
        if len(data) - end > MAX_HELD_BYTES:
            end = len(data)
        self._held = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """Return what is held; nothing is afterwards."""
        held, self._held = self._held, b""
        return held
