"""The client's side of a connection: streams that are begun here and answered there."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque

from servicekit.http2 import frames
from servicekit.http2.connection import CONNECTION_WINDOW, MOST_HEADER_BYTES, Connection
from servicekit.http2.frames import MOST_STREAM_ID, ErrorCode, Setting
from servicekit.http2.headers import Block, Fields
from servicekit.http2.stream import STREAM_WINDOW, Stream

STREAMS_UNTIL_TOLD = 100
"""At once, before the server has said how many it takes."""


class AskedStream(Stream):
    """A request that was sent."""

    __slots__ = ()

    @abstractmethod
    def fields_arrived(self, fields: Fields, *, ends: bool) -> None:
        """Headers of the answer, or with `ends` its trailers, or both."""

    @abstractmethod
    def untouched(self) -> None:
        """The server took it up in no way; it may be sent again elsewhere."""


class ClientConnection(Connection):
    """To one server. `usable` says whether new streams can begin."""

    def __init__(self) -> None:
        super().__init__()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._most_streams = STREAMS_UNTIL_TOLD
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def usable(self) -> bool:
        return not self.is_lost and not self.is_going_away and self.last_stream_id < MOST_STREAM_ID

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._speaks_http2():
            self._transport.abort()
            return
        self._watch()
        self.push(frames.PREFACE + frames.settings_frame({
            Setting.ENABLE_PUSH: 0, Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_HEADER_LIST_SIZE: MOST_HEADER_BYTES,
        }) + frames.window_update_frame(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wake_waiting()
        if not self._greeted.done():
            self._greeted.set_result(None)

    async def greeted(self) -> None:
        """Waits for the server's first word. Raises ConnectionError when there is none; the connection is closed then,
        as it is when the waiting is cancelled."""
        try:
            await self._greeted
        except asyncio.CancelledError:
            self._transport.abort()
            raise
        if not self.usable:
            raise ConnectionResetError("it does not speak HTTP/2")

    async def place(self) -> bool:
        """Waits until the server takes one more stream. False when it never will."""
        while self.usable and len(self.streams) >= self._most_streams:
            waiting: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                self._wake_one()  # who leaves passes on what it may have been given
                raise
        return self.usable

    def begin(self, stream: AskedStream) -> None:
        """Gives it its number; its headers must follow in this turn of the loop."""
        self.last_stream_id += 2 if self.last_stream_id else 1
        stream.stream_id = self.last_stream_id
        stream.send_window = self.initial_send_window
        self.streams[stream.stream_id] = stream

    def forget(self, stream: Stream) -> None:
        super().forget(stream)
        self._wake_one()

    def _wake_one(self) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return

    def _wake_waiting(self) -> None:
        while self._waiting:
            self._wake_one()

    def _headers_arrived(self, stream_id: int, block: Block, *, ends: bool) -> None:
        self._require_begun(stream_id)
        stream = self.streams.get(stream_id)
        if stream is None:
            return  # given up here, and still answered there
        assert isinstance(stream, AskedStream)
        if ends:
            stream.input_ended = True
        stream.fields_arrived(block.fields, ends=ends)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        super()._on_settings(flags, stream_id, payload)
        if not self._greeted.done():
            self._greeted.set_result(None)

    def _setting_changed(self, name: int, value: int) -> None:
        if name == Setting.MAX_CONCURRENT_STREAMS:
            self._most_streams = value
            self._wake_waiting()

    def _on_reset(self, flags: int, stream_id: int, payload: bytes) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None and payload == ErrorCode.REFUSED_STREAM.to_bytes(4, "big"):
            assert isinstance(stream, AskedStream)
            self.forget(stream)
            stream.untouched()
            return
        super()._on_reset(flags, stream_id, payload)

    def _went_away(self, last_stream_id: int, code: int) -> None:
        self.is_going_away = True
        for stream in [each for number, each in self.streams.items() if number > last_stream_id]:
            assert isinstance(stream, AskedStream)
            self.forget(stream)
            stream.untouched()
        self._wake_waiting()
        self._close_if_done()
