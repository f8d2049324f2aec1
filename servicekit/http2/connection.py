"""One HTTP/2 connection on asyncio, either side of it (RFC 9113): frames in, streams, flow control, frames out.

It knows nothing of what is served or asked. What several streams send within one turn of the event loop goes out in one
write. `server.py` and `client.py` beside this have what only one side does.

Limits, so that a peer can not make this side work or remember without end: bytes and frames of a header block, bytes of
unfinished messages, empty frames, and frames that the peer does not read.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from servicekit.http2 import frames
from servicekit.http2.frames import ErrorCode, Flag, Http2Error, Kind, Setting
from servicekit.http2.headers import Block, BlockReader, Fields, require_trailers
from servicekit.http2.stream import STREAM_WINDOW, Stream

CONNECTION_WINDOW = 2**24
MOST_UNFINISHED_BYTES = 96 * 2**20
"""Of messages that have not wholly arrived, all streams of a connection together."""
MOST_HEADER_BYTES = 64 * 2**10
MOST_CONTINUATIONS = 32
MOST_EMPTY_FRAMES = 200
"""DATA without a byte and without an end, and PRIORITY: they cost work and mean nothing."""
PENDING_BYTES = 256 * 2**10
"""What may wait for the next turn's write before a stream has to wait."""
MOST_UNREAD_BYTES = 8 * 2**20
"""Of what the peer does not read; streams stop far earlier, this is for floods of PING and SETTINGS."""
KEEPALIVE_SECONDS = 30.0
KEEPALIVE_ANSWER_SECONDS = 20.0
_HEADER = frames.HEADER


class Connection(asyncio.Protocol, ABC):
    """With one peer. Subclasses say what headers mean that begin something."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._rest = b""
        self._read: Callable[[bytes], None] = self._read_frames
        self._blocks = BlockReader(most_bytes=MOST_HEADER_BYTES)
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
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            Kind.DATA: self._on_data, Kind.HEADERS: self._on_headers, Kind.PRIORITY: self._on_priority,
            Kind.RST_STREAM: self._on_reset, Kind.SETTINGS: self._on_settings, Kind.PUSH_PROMISE: self._on_push_promise,
            Kind.PING: self._on_ping, Kind.GOAWAY: self._on_goaway, Kind.WINDOW_UPDATE: self._on_window_update,
            Kind.CONTINUATION: self._on_continuation,
        }
        self.streams: dict[int, Stream] = {}
        self.blocked: set[Stream] = set()
        """Streams that wait for a window."""
        self.last_stream_id = 0
        """The newest that the client has begun."""
        self.unfinished = 0
        self.is_going_away = False
        self.is_lost = False
        self.initial_send_window = frames.DEFAULT_WINDOW
        self.send_window = frames.DEFAULT_WINDOW
        self.most_frame = frames.DEFAULT_FRAME_SIZE

    # What the two sides do differently

    @abstractmethod
    def _headers_arrived(self, stream_id: int, block: Block, *, ends: bool) -> None:
        """Headers of a stream that is not open, or of one on the client's side."""

    @abstractmethod
    def _went_away(self, last_stream_id: int, code: int) -> None:
        """The peer takes no more streams, and none above `last_stream_id` was or will be touched."""

    def _was_reset(self, stream: Stream) -> None:
        """The peer cancelled one stream."""

    def _setting_changed(self, name: int, value: int) -> None:
        """Of those that only one side cares for."""

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

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
            self._abort(stream, "the connection is gone", None)
        self.resume_writing()

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

    def _speaks_http2(self) -> bool:
        """With TLS, whether that was agreed on (ALPN)."""
        tls = self._transport.get_extra_info("ssl_object")
        return tls is None or tls.selected_alpn_protocol() == "h2"

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
        stream.wake()
        stream.ended()
        if self.is_going_away:
            self._close_if_done()

    def _abort(self, stream: Stream, reason: str, code: ErrorCode | None) -> None:
        self.forget(stream)
        stream.aborted(reason, code)

    # Liveness

    def _watch(self) -> None:
        """From now on the peer must be heard of, at least when it is asked."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(KEEPALIVE_SECONDS, self._keep_alive)

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
            self._abort(stream, str(error), None)

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._unacknowledged += size
        if self._unacknowledged > CONNECTION_WINDOW // 4:
            self.push(frames.window_update_frame(0, self._unacknowledged))
            self._unacknowledged = 0
        stream = self.streams.get(stream_id)
        if stream is None or stream.input_ended:
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
            self._end_input(stream)

    def _end_input(self, stream: Stream) -> None:
        if stream.missing:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "content-length is not the body's", stream_id=stream.stream_id)
        stream.input_ended = True
        self.unfinished -= stream.unfinished
        stream.unfinished = 0
        stream.input_complete()

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & Flag.PADDED:
            payload = frames.without_padding(flags, payload)
        if flags & Flag.PRIORITY:
            if len(payload) < 5:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "HEADERS are too short for their priority")
            payload = payload[5:]
        if flags & Flag.END_HEADERS:
            self._block_arrived(flags, stream_id, payload)
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
            self._block_arrived(first_flags, stream_id, bytes(block))

    def _block_arrived(self, flags: int, stream_id: int, block: bytes) -> None:
        read = self._blocks.read(block)
        if not stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "HEADERS of no stream")
        self._headers_arrived(stream_id, read, ends=bool(flags & Flag.END_STREAM))

    def _trailers_arrived(self, stream: Stream, fields: Fields, *, ends: bool) -> None:
        """Headers behind the body. What they say is not looked at."""
        if stream.input_ended:
            raise Http2Error(ErrorCode.STREAM_CLOSED, "HEADERS after the end", stream_id=stream.stream_id)
        if not ends:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "HEADERS within a message", stream_id=stream.stream_id)
        require_trailers(fields, stream.stream_id)
        self._end_input(stream)

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
            self._abort(stream, "the other side cancelled", frames.error_code(payload))
            self._was_reset(stream)

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
            else:
                self._setting_changed(name, value)
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
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "nobody here wants promises")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if not flags & Flag.ACK:
            self.push(frames.frame(Kind.PING, Flag.ACK, 0, payload))

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "GOAWAY of a stream")
        if len(payload) < 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is shorter than 8 bytes")
        last_stream_id, code = struct.unpack_from(">II", payload)
        self._went_away(last_stream_id & frames.STREAM_MASK, code)

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
