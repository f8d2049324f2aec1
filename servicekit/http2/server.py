"""The server's side of a connection: each request that a client begins becomes a stream.

Beside the limits of every connection: streams at once, and resets (CVE-2023-44487).
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import Protocol

from servicekit.http2 import frames
from servicekit.http2.connection import CONNECTION_WINDOW, MOST_HEADER_BYTES, Connection
from servicekit.http2.frames import ErrorCode, Http2Error, Setting
from servicekit.http2.headers import Block, RequestHeaders, read_request
from servicekit.http2.stream import STREAM_WINDOW, Stream

MOST_STREAMS = 10_000
"""At once on one connection."""
SPARE_RESETS = 1000
"""A client that resets this many calls more than it lets end is asked to come back on another connection."""
PREFACE_SECONDS = 20.0


class ServedStream(Stream):
    """A request that is answered."""

    __slots__ = ()

    connection: ServerConnection

    @abstractmethod
    def begun(self) -> None:
        """The headers are here; from now on it may answer."""

    def answered(self) -> None:
        """The answer has ended. What is still to come of the request nobody reads."""
        if self.is_closed:
            return
        self.connection.streams_answered += 1
        if not self.input_ended:
            self.connection.push(frames.reset_frame(self.stream_id, ErrorCode.NO_ERROR))
        self.connection.forget(self)


class Streams(Protocol):
    """What serves the streams of a connection."""

    def begin(self, connection: ServerConnection, stream_id: int, headers: RequestHeaders) -> ServedStream:
        """The object that stands for a request."""

    def opened(self, connection: ServerConnection) -> None: ...

    def closed(self, connection: ServerConnection) -> None: ...


class ServerConnection(Connection):
    """Of one client."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._served = streams
        self._read = self._read_preface
        self._resets_left = SPARE_RESETS
        self.number = 0
        """What its server calls it."""
        self.streams_begun = 0
        self.streams_answered = 0
        """Of them those whose answer was given to its end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._speaks_http2():
            self._transport.abort()
            return
        self._served.opened(self)
        self._timer = self._loop.call_later(PREFACE_SECONDS, self._transport.abort)
        self.push(frames.settings_frame({
            Setting.MAX_CONCURRENT_STREAMS: MOST_STREAMS, Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_HEADER_LIST_SIZE: MOST_HEADER_BYTES,
        }) + frames.window_update_frame(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._served.closed(self)

    def go_away(self, code: ErrorCode = ErrorCode.NO_ERROR, text: str = "") -> None:
        """No new streams; the connection ends with the last of those that run."""
        if not self.is_going_away:
            self.is_going_away = True
            self.push(frames.goaway_frame(self.last_stream_id, code, text))
            self._close_if_done()

    def forget(self, stream: Stream) -> None:
        if not stream.is_closed and self._resets_left < SPARE_RESETS:
            self._resets_left += 1
        super().forget(stream)

    def _read_preface(self, data: bytes) -> None:
        if not data.startswith(frames.PREFACE):
            if not frames.PREFACE.startswith(data):
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "this is a gRPC server: HTTP/2 without an upgrade")
            self._rest = data
            return
        self._watch()
        self._read = self._read_frames
        self._read_frames(data[len(frames.PREFACE):])

    def _headers_arrived(self, stream_id: int, block: Block, *, ends: bool) -> None:
        known = self.streams.get(stream_id)
        if known is not None:
            self._trailers_arrived(known, block.fields, ends=ends)
            return
        if stream_id % 2 == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a client's streams have odd numbers")
        if stream_id <= self.last_stream_id:
            raise Http2Error(ErrorCode.STREAM_CLOSED, "HEADERS of a stream that has ended")
        if self.is_going_away:
            return
        self.last_stream_id = stream_id
        if len(self.streams) >= MOST_STREAMS:
            raise Http2Error(ErrorCode.REFUSED_STREAM, "too many streams", stream_id=stream_id)
        headers = block.request
        if headers is None:
            headers = block.request = read_request(block.fields, stream_id)
        self.streams_begun += 1
        stream = self._served.begin(self, stream_id, headers)
        stream.missing = headers.content_length
        self.streams[stream_id] = stream
        stream.begun()
        if ends and not stream.is_closed:
            self._end_input(stream)

    def _was_reset(self, stream: Stream) -> None:
        self._resets_left -= 2  # one of them was given back when the stream closed
        if self._resets_left < 0:
            self.go_away(ErrorCode.ENHANCE_YOUR_CALM, "too many resets")

    def _went_away(self, last_stream_id: int, code: int) -> None:
        """The client begins nothing more; what it began it still reads."""
