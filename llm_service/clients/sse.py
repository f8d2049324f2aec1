"""Server-sent events (WHATWG HTML, "Server-sent events") out of reads that cut them anywhere; data only.

The providers say in the data what kind of event it is, so that event names, ids and retry times are skipped.
"""

from __future__ import annotations

MOST_EVENT_BYTES = 4 * 1024 * 1024


class EventTooLong(Exception):
    """An event is longer than MOST_EVENT_BYTES: nobody's answer, and nothing to be buffered."""


class SseParser:
    """Feed it what was read; it answers the data of the events that are complete."""

    __slots__ = ("_after_cr", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Raises EventTooLong."""
        if self._after_cr or b"\r" in data:
            data = self._with_line_feeds(data)
        blocks = (self._rest + data).split(b"\n\n")
        self._rest = blocks.pop()
        if len(self._rest) > MOST_EVENT_BYTES:
            self._rest = b""
            raise EventTooLong
        events = []
        for block in blocks:
            payload = _data_of(block)
            if payload:
                events.append(payload)
        return events

    def finish(self) -> list[bytes]:
        """The stream is over: an event that lacks nothing but its empty line counts."""
        payload = _data_of(self._rest)
        self._rest = b""
        return [payload] if payload else []

    def _with_line_feeds(self, data: bytes) -> bytes:
        """CR LF and CR are line ends too; one that is cut in two is one."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data_of(block: bytes) -> bytes:
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines).strip()
