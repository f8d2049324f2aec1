"""One HTTP/2 connection of a server on asyncio (RFC 9113): frames in, streams, flow control, frames out.

It knows nothing of what is served: `Streams` make an object for each request, and the connection feeds it. What several
streams send within one turn of the event loop goes out in one write.

Limits, so that a peer can not make a server work or remember without end: concurrent streams, bytes and frames of a
header block, bytes of unfinished requests, resets (CVE-2023-44487), empty frames, and answers that are not read.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Protocol

import hpack

from servicekit.http2 import frames
from servicekit.http2.frames import ErrorCode, Flag, Http2Error, Kind, Setting
from servicekit.http2.headers import RequestHeaders, read_request, require_trailers

MOST_STREAMS = 10_000
"""At once on one connection."""
STREAM_WINDOW = 2**20
CONNECTION_WINDOW = 2**24
MOST_UNFINISHED_BYTES = 96 * 2**20
"""Of requests that have not wholly arrived, all streams of a connection together."""
MOST_HEADER_BYTES = 64 * 2**10
MOST_CONTINUATIONS = 32
MOST_EMPTY_FRAMES = 200
"""DATA without a byte and without an end, and PRIORITY: they cost work and mean nothing."""
SPARE_RESETS = 1000
"""A peer that resets this many calls more than it lets end is asked to come back on another connection."""
PENDING_BYTES = 256 * 2**10
"""What may wait for the next turn's write before a stream has to wait."""
MOST_UNREAD_BYTES = 8 * 2**20
"""Of answers that the peer does not read; streams stop far earlier, this is for floods of PING and SETTINGS."""
PREFACE_SECONDS = 20.0
KEEPALIVE_SECONDS = 30.0
KEEPALIVE_ANSWER_SECONDS = 20.0
_HEADER = frames.HEADER


class Streams(Protocol):
    """What serves the streams of a connection."""

    def begin(self, connection: Connection, stream_id: int, headers: RequestHeaders) -> Stream:
        """The object that stands for a request."""

    def opened(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None: ...


class Stream:
    """One request and its answer. Subclasses take what arrives; each method is called on the event loop."""

    __slots__ = (
        "_is_sending", "_opening", "connection", "is_closed", "missing", "request_ended", "send_window", "stream_id",
        "uncredited", "unfinished",
    )

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.send_window = connection.initial_send_window
        self.request_ended = False
        self.is_closed = False
        """Both sides have ended, or one reset it."""
        self.uncredited = 0
        """Bytes that arrived and that the peer was not yet allowed to send again."""
        self.unfinished = 0
        self.missing: int | None = None
        """Bytes of the body that its content-length promised, if it has one, and that have not arrived."""
        self._is_sending = False
        self._opening: asyncio.Future[None] | None = None

    # What arrives

    def begun(self) -> None:
        """The headers are here; from now on it may answer."""
        raise NotImplementedError

    def data_arrived(self, data: bytes) -> None:
        """Some bytes of the request's body."""
        raise NotImplementedError

    def request_arrived(self) -> None:
        """The request has ended; there may be no byte of a body."""
        raise NotImplementedError

    def aborted(self, reason: str) -> None:
        """The peer reset the stream, or the connection is gone: nobody will read an answer."""
        raise NotImplementedError

    def ended(self) -> None:
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
        if connection.is_full or size > min(self.send_window, connection.send_window, connection.most_frame):
            return False
        self.send_window -= size
        connection.send_window -= size
        connection.push(b"%b%b%b%b" % (head, frames.frame_header(size, Kind.DATA, 0, self.stream_id), data, tail))
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
        if self.uncredited >= STREAM_WINDOW // 4 and not self.request_ended and not self.is_closed:
            self.connection.push(frames.window_update_frame(self.stream_id, self.uncredited))
            self.uncredited = 0

    def finished(self, *, code: ErrorCode | None = None) -> None:
        """The answer has ended. A request that has not is cut off, as a code or because nobody reads on."""
        if self.is_closed:
            return
        if code is not None:
            self.connection.push(frames.reset_frame(self.stream_id, code))
        elif not self.request_ended:
            self.connection.push(frames.reset_frame(self.stream_id, ErrorCode.NO_ERROR))
        if code is None:
            self.connection.streams_finished += 1
        self.connection.forget(self)


class Connection(asyncio.Protocol):
    """Of one client."""

    def __init__(self, streams: Streams) -> None:
        self._served = streams
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._rest = b""
        self._read: Callable[[bytes], None] = self._read_preface
        self._decoder = hpack.Decoder(max_header_list_size=MOST_HEADER_BYTES)
        self._out: list[bytes] = []
        self._out_size = 0
        self._is_flush_due = False
        self._is_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._settings_seen = False
        self._block: tuple[int, int, bytearray, int] | None = None
        """Of HEADERS that are continued: stream, flags, bytes, frames."""
        self._unacknowledged = 0
        self._empty_frames = 0
        self._resets_left = SPARE_RESETS
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            Kind.DATA: self._on_data, Kind.HEADERS: self._on_headers, Kind.PRIORITY: self._on_priority,
            Kind.RST_STREAM: self._on_reset, Kind.SETTINGS: self._on_settings, Kind.PUSH_PROMISE: self._on_push_promise,
            Kind.PING: self._on_ping, Kind.GOAWAY: self._on_goaway, Kind.WINDOW_UPDATE: self._on_window_update,
            Kind.CONTINUATION: self._on_continuation,
        }
        self.number = 0
        """What its server calls it."""
        self.streams: dict[int, Stream] = {}
        self.blocked: set[Stream] = set()
        """Streams that wait for a window."""
        self.last_stream_id = 0
        self.unfinished = 0
        self.is_going_away = False
        self.is_lost = False
        self.initial_send_window = frames.DEFAULT_WINDOW
        self.send_window = frames.DEFAULT_WINDOW
        self.most_frame = frames.DEFAULT_FRAME_SIZE
        self.streams_begun = 0
        self.streams_finished = 0
        """Of them those whose answer was given to its end."""

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._transport.abort()
            return
        self._served.opened(self)
        self._timer = self._loop.call_later(PREFACE_SECONDS, self._no_preface)
        self.push(frames.settings_frame({
            Setting.MAX_CONCURRENT_STREAMS: MOST_STREAMS, Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_HEADER_LIST_SIZE: MOST_HEADER_BYTES,
        }) + frames.window_update_frame(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            self._read(self._rest + data if self._rest else data)
        except Http2Error as error:
            self._fail(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._timer is not None:
            self._timer.cancel()
        for stream in list(self.streams.values()):
            self._abort(stream, "the connection is gone")
        self.resume_writing()
        self._served.closed(self)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def address(self, which: str) -> Any:
        """`sockname` or `peername`: a tuple that begins with host and port, or whatever else the transport says."""
        return self._transport.get_extra_info(which)

    # Out

    @property
    def is_full(self) -> bool:
        """Whether a stream has to wait before it sends more."""
        return self._is_paused or self._out_size > PENDING_BYTES

    def push(self, data: bytes) -> None:
        """Frames for the next write."""
        self._out.append(data)
        self._out_size += len(data)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if not self._out:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        self._out_size = 0
        if self.is_lost or self._transport.is_closing():
            return
        self._transport.write(data)
        if self._is_paused and self._transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            self._transport.abort()

    async def drained(self) -> None:
        """Waits while the peer reads slower than is written."""
        if self._out_size > PENDING_BYTES:
            self._flush()
            await asyncio.sleep(0)
        while self._is_paused and not self.is_lost:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)

    # Its end

    def go_away(self) -> None:
        """No new streams; the connection ends with the last of those that run."""
        if not self.is_going_away:
            self.is_going_away = True
            self.push(frames.goaway_frame(self.last_stream_id, ErrorCode.NO_ERROR))
            self._close_if_done()

    def close(self) -> None:
        """At once, after what was pushed."""
        self._flush()
        self._transport.close()

    def _close_if_done(self) -> None:
        if self.is_going_away and not self.streams:
            self._loop.call_soon(self.close)

    def _fail(self, error: Http2Error) -> None:
        self.is_going_away = True
        self._rest = b""
        self._read = self._ignore
        self.push(frames.goaway_frame(self.last_stream_id, error.code, str(error)))
        self.close()

    def _ignore(self, data: bytes) -> None:
        pass

    def forget(self, stream: Stream) -> None:
        """The stream is closed."""
        if stream.is_closed:
            return
        stream.is_closed = True
        self.unfinished -= stream.unfinished
        stream.unfinished = 0
        self.streams.pop(stream.stream_id, None)
        if self._resets_left < SPARE_RESETS:
            self._resets_left += 1
        stream.wake()
        stream.ended()
        if self.is_going_away:
            self._close_if_done()

    def _abort(self, stream: Stream, reason: str) -> None:
        self.forget(stream)
        stream.aborted(reason)

    # Liveness

    def _no_preface(self) -> None:
        self._transport.abort()

    def _keep_alive(self) -> None:
        if self._heard:
            self._heard = False
            self._timer = self._loop.call_later(KEEPALIVE_SECONDS, self._keep_alive)
            return
        self.push(frames.frame(Kind.PING, 0, 0, b"alive?\0\0"))
        self._timer = self._loop.call_later(KEEPALIVE_ANSWER_SECONDS, self._require_answer)

    def _require_answer(self) -> None:
        if self._heard:
            self._keep_alive()
        else:
            self._transport.abort()

    # In

    def _read_preface(self, data: bytes) -> None:
        if not data.startswith(frames.PREFACE):
            if not frames.PREFACE.startswith(data):
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "this is a gRPC server: HTTP/2 without an upgrade")
            self._rest = data
            return
        assert self._timer is not None
        self._timer.cancel()
        self._timer = self._loop.call_later(KEEPALIVE_SECONDS, self._keep_alive)
        self._read = self._read_frames
        self._read_frames(data[len(frames.PREFACE):])

    def _read_frames(self, data: bytes) -> None:
        position, size = 0, len(data)
        while size - position >= 9:
            upper, lower, kind, flags, stream_id = _HEADER.unpack_from(data, position)
            length = upper << 8 | lower
            if length > frames.DEFAULT_FRAME_SIZE:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "a frame is larger than 16384 bytes")
            end = position + 9 + length
            if end > size:
                break
            stream_id &= frames.STREAM_MASK
            if self._block is not None and kind != Kind.CONTINUATION:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a block of headers was not continued")
            if not self._settings_seen and kind != Kind.SETTINGS:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            handler = self._handlers.get(kind)
            if handler is not None:
                try:
                    handler(flags, stream_id, data[position + 9 : end])
                except Http2Error as error:
                    if not error.stream_id:
                        raise
                    self._reset(error)
            position = end
        self._rest = data[position:]

    def _reset(self, error: Http2Error) -> None:
        """One stream alone ends."""
        self.push(frames.reset_frame(error.stream_id, error.code))
        stream = self.streams.get(error.stream_id)
        if stream is not None:
            self._abort(stream, str(error))

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._unacknowledged += size
        if self._unacknowledged > CONNECTION_WINDOW // 4:
            self.push(frames.window_update_frame(0, self._unacknowledged))
            self._unacknowledged = 0
        stream = self.streams.get(stream_id)
        if stream is None or stream.request_ended:
            self._require_begun(stream_id)
            raise Http2Error(ErrorCode.STREAM_CLOSED, "DATA after the end of a stream", stream_id=stream_id)
        if flags & Flag.PADDED:
            payload = frames.without_padding(flags, payload)
        stream.uncredited += size
        if stream.uncredited > STREAM_WINDOW:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than was allowed", stream_id=stream_id)
        if stream.missing is not None:
            stream.missing -= len(payload)
        if payload:
            stream.data_arrived(payload)
        elif not flags & Flag.END_STREAM:
            self._count_empty_frame()
        if flags & Flag.END_STREAM and not stream.is_closed:
            self._end_request(stream)

    def _end_request(self, stream: Stream) -> None:
        if stream.missing:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "content-length is not the body's", stream_id=stream.stream_id)
        stream.request_ended = True
        self.unfinished -= stream.unfinished
        stream.unfinished = 0
        stream.request_arrived()

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & Flag.PADDED:
            payload = frames.without_padding(flags, payload)
        if flags & Flag.PRIORITY:
            if len(payload) < 5:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "HEADERS are too short for their priority")
            payload = payload[5:]
        if flags & Flag.END_HEADERS:
            self._headers_arrived(flags, stream_id, payload)
        else:
            self._block = (stream_id, flags, bytearray(payload), 0)

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first_flags, block, count = self._block
        block += payload
        if len(block) > MOST_HEADER_BYTES or count >= MOST_CONTINUATIONS:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "a block of headers is too large")
        self._block = (stream_id, first_flags, block, count + 1)
        if flags & Flag.END_HEADERS:
            self._block = None
            self._headers_arrived(first_flags, stream_id, bytes(block))

    def _headers_arrived(self, flags: int, stream_id: int, block: bytes) -> None:
        try:
            fields: Any = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a block of headers can not be read") from error
        stream = self.streams.get(stream_id)
        if stream is not None:
            if stream.request_ended:
                raise Http2Error(ErrorCode.STREAM_CLOSED, "HEADERS after the end of a stream", stream_id=stream_id)
            if not flags & Flag.END_STREAM:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "HEADERS within a request", stream_id=stream_id)
            require_trailers(fields, stream_id)
            self._end_request(stream)
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
        headers = read_request(fields, stream_id)
        self.streams_begun += 1
        stream = self.streams[stream_id] = self._served.begin(self, stream_id, headers)
        stream.missing = headers.content_length
        stream.begun()
        if flags & Flag.END_STREAM and not stream.is_closed:
            self._end_request(stream)

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Deprecated (section 5.3.2), and ignored."""
        if stream_id == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PRIORITY of no stream")
        if len(payload) != 5:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY is not 5 bytes", stream_id=stream_id)
        self._count_empty_frame()

    def _on_reset(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        self._require_begun(stream_id)
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._resets_left -= 2
            self._abort(stream, "the client cancelled")
            if self._resets_left < 0 and not self.is_going_away:
                self.is_going_away = True
                self.push(frames.goaway_frame(self.last_stream_id, ErrorCode.ENHANCE_YOUR_CALM, "too many resets"))
                self._close_if_done()

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "SETTINGS of a stream")
        self._settings_seen = True
        if flags & Flag.ACK:
            if payload:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement says something")
            return
        for name, value in frames.settings_from(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                self._resize_windows(value)
            elif name == Setting.MAX_FRAME_SIZE:
                self.most_frame = min(value, 2**20)
        self.push(frames.frame(Kind.SETTINGS, Flag.ACK, 0))

    def _resize_windows(self, size: int) -> None:
        change = size - self.initial_send_window
        self.initial_send_window = size
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > frames.MOST_WINDOW:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "a window is too large")
            stream.wake()

    def _on_push_promise(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a client can not promise")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if not flags & Flag.ACK:
            self.push(frames.frame(Kind.PING, Flag.ACK, 0, payload))

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        """The client will begin nothing more; what it began it still reads."""
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "GOAWAY of a stream")
        if len(payload) < 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is shorter than 8 bytes")

    def _on_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes")
        (increment,) = struct.unpack(">I", payload)
        increment &= frames.STREAM_MASK
        if not increment:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing", stream_id=stream_id)
        if stream_id == 0:
            self.send_window += increment
            if self.send_window > frames.MOST_WINDOW:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is too large")
            for stream in tuple(self.blocked):
                stream.wake()
            return
        self._require_begun(stream_id)
        found = self.streams.get(stream_id)
        if found is not None:
            found.send_window += increment
            if found.send_window > frames.MOST_WINDOW:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "a window is too large", stream_id=stream_id)
            found.wake()

    def _require_begun(self, stream_id: int) -> None:
        if stream_id == 0 or stream_id % 2 == 0 or (stream_id > self.last_stream_id and not self.is_going_away):
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a frame of a stream that was never begun")

    def _count_empty_frame(self) -> None:
        self._empty_frames += 1
        if self._empty_frames > MOST_EMPTY_FRAMES:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that say nothing")
