"""One stream of an HTTP/2 connection: what arrives on it, and what is sent as fast as the peer allows."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from servicekit.http2 import frames
from servicekit.http2.frames import ErrorCode, Kind

if TYPE_CHECKING:
    from servicekit.http2.connection import Connection

STREAM_WINDOW = 2**20
"""Bytes that the peer may send on a stream before they are taken."""


class Stream(ABC):
    """One request and its answer. Subclasses take what arrives; each method is called on the event loop."""

    __slots__ = (
        "_is_sending", "_opening", "connection", "input_ended", "is_closed", "missing", "send_window", "stream_id",
        "uncredited", "unfinished",
    )

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.send_window = connection.initial_send_window
        self.input_ended = False
        self.is_closed = False
        """Both sides have ended, or one reset it."""
        self.uncredited = 0
        """Bytes that arrived and that the peer was not yet allowed to send again."""
        self.unfinished = 0
        """Bytes of a message that has not wholly arrived."""
        self.missing: int | None = None
        """Bytes of the body that its content-length promised, if it has one, and that have not arrived."""
        self._is_sending = False
        self._opening: asyncio.Future[None] | None = None

    # What arrives

    @abstractmethod
    def data_arrived(self, data: bytes) -> None:
        """Some bytes of the body."""

    @abstractmethod
    def input_complete(self) -> None:
        """The peer has said everything."""

    @abstractmethod
    def aborted(self, reason: str, code: ErrorCode | None) -> None:
        """The peer reset the stream with `code`, or the connection is gone: nobody reads what is sent."""

    def ended(self) -> None:  # noqa: B027 - most have nothing to do then
        """Said once, when the stream has closed."""

    # What is sent

    @property
    def is_sending(self) -> bool:
        """Whether a message has gone out in part."""
        return self._is_sending

    def try_send(self, head: bytes, data: bytes, tail: bytes = b"") -> bool:
        """Frames of headers, one message, frames of trailers, all at once, if nothing has to wait; else nothing."""
        size = len(data)
        connection = self.connection
        if connection.is_full or size > min(self.send_window, connection.send_window):
            return False
        self.send_window -= size
        connection.send_window -= size
        if size <= connection.most_frame:
            framed = frames.frame_header(size, Kind.DATA, 0, self.stream_id) + data
        else:
            framed = frames.data_frames(self.stream_id, data, connection.most_frame)
        connection.push(head + framed + tail)
        return True

    async def send(self, head: bytes, data: bytes, tail: bytes = b"") -> None:
        """The same in as many frames as it needs, as fast as the peer allows. Raises ConnectionError."""
        if head:
            self._require_open()
            self.connection.push(head)
        view = memoryview(data)
        while view:
            self._is_sending = len(view) < len(data)
            await self.connection.drained()
            self._require_open()
            size = min(len(view), self.send_window, self.connection.send_window, self.connection.most_frame)
            if size <= 0:
                await self._window_opened()
                continue
            self.send_window -= size
            self.connection.send_window -= size
            self.connection.push(frames.frame_header(size, Kind.DATA, 0, self.stream_id) + view[:size])
            view = view[size:]
        self._is_sending = False
        self._require_open()
        if tail:
            self.connection.push(tail)

    def _require_open(self) -> None:
        if self.is_closed:
            raise ConnectionError("the peer is gone")

    async def _window_opened(self) -> None:
        self._opening = asyncio.get_running_loop().create_future()
        self.connection.blocked.add(self)
        try:
            await self._opening
        finally:
            self._opening = None
            self.connection.blocked.discard(self)

    def wake(self) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.set_result(None)

    def credit(self) -> None:
        """What arrived was taken: the peer may send as much again."""
        if self.uncredited >= STREAM_WINDOW // 4 and not self.input_ended and not self.is_closed:
            self.connection.push(frames.window_update_frame(self.stream_id, self.uncredited))
            self.uncredited = 0

    def reset(self, code: ErrorCode) -> None:
        """Nothing more is said, and nothing more is heard."""
        if not self.is_closed:
            self.connection.push(frames.reset_frame(self.stream_id, code))
            self.connection.forget(self)
