"""gRPC over one HTTP/2 stream: messages in their frames, metadata, deadline, status; and the context of its handler.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from servicekit.http2 import frames, headers
from servicekit.http2.connection import MOST_UNFINISHED_BYTES, Connection, Stream
from servicekit.http2.frames import ErrorCode, Flag, Kind
from servicekit.http2.headers import RequestHeaders
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

MOST_MESSAGE_BYTES = 32 * 1024 * 1024
_PREFIX = struct.Struct(">BI")
"""Of each message: whether it is compressed, and its length."""
_SECONDS_OF = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_HEAD = headers.STATUS_OK + headers.encode([(b"content-type", b"application/grpc")])
_OK = headers.encode([(b"grpc-status", b"0")])
_WINDOW_BITS = {b"deflate": zlib.MAX_WBITS, b"gzip": zlib.MAX_WBITS | 16}
_ACCEPTED_ENCODINGS = "identity, deflate, gzip"
_OF_THE_PROTOCOL = frozenset({b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"})

Metadata = Sequence[tuple[str, str | bytes]]
Handler = Any
"""grpc.RpcMethodHandler with functions for asyncio."""


class RefusedError(Exception):
    """The request can not be taken; the client is told why."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Metadata = ()) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.trailers = trailers


class CallBook(Protocol):
    """What a call knows of its server."""

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """By full method name."""

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """Handlers that run, also those whose client is gone."""

    def ended(self, call: Call) -> None: ...


class Call(Stream):
    """One RPC. Handlers get it as their context: it has what they, and the services of gRPC's own packages, use of
    grpc.aio.ServicerContext."""

    __slots__ = (
        "_book", "_buffer", "_deadline", "_encoding", "_fields", "_handler", "_head_sent", "_http_method", "_messages",
        "_reader", "_status", "_task", "_timer", "method", "succeeded",
    )

    def __init__(self, connection: Connection, stream_id: int, request: RequestHeaders, book: CallBook) -> None:
        super().__init__(connection, stream_id)
        self.method = request.path.decode("latin-1")
        self.succeeded = False
        self._http_method = request.method
        self._fields = request.fields
        self._book = book
        self._handler: Handler = None
        self._encoding = b"identity"
        self._buffer: bytes | bytearray = b""
        self._messages: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._head_sent = False
        self._status: tuple[grpc.StatusCode, str, Metadata] = (grpc.StatusCode.OK, "", ())

    # The request arrives

    def begun(self) -> None:
        try:
            if not self._is_grpc():
                return
            self._read_headers()
        except RefusedError as error:
            self._end(error.code, error.details, error.trailers)
            return
        if self._handler.request_streaming:
            self._start(self._requests())

    def _is_grpc(self) -> bool:
        """Whether it is a request of gRPC; else it is answered as HTTP demands."""
        if self._http_method != b"POST":
            self._answer_http(405)
        elif not any(name == b"content-type" and value.startswith(b"application/grpc") for name, value in self._fields):
            self._answer_http(415)
        return not self.is_closed

    def _read_headers(self) -> None:
        for name, value in self._fields:
            if name == b"grpc-timeout":
                self._set_deadline(value.decode("latin-1"))
            elif name == b"grpc-encoding":
                self._encoding = value
        self._handler = self._book.handlers.get(self.method)
        if self._handler is None:
            raise RefusedError(grpc.StatusCode.UNIMPLEMENTED, "there is no such method here")
        if self._encoding != b"identity" and self._encoding not in _WINDOW_BITS:
            raise RefusedError(
                grpc.StatusCode.UNIMPLEMENTED, "the request's encoding is not known here",
                [("grpc-accept-encoding", _ACCEPTED_ENCODINGS)],
            )

    def _set_deadline(self, text: str) -> None:
        match = _TIMEOUT.fullmatch(text)
        if match is None:
            raise RefusedError(grpc.StatusCode.INTERNAL, "grpc-timeout can not be read")
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + int(match[1]) * _SECONDS_OF[match[2]]
        self._timer = loop.call_at(
            self._deadline, self.give_up, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed"
        )

    def data_arrived(self, data: bytes) -> None:
        if not self._buffer:
            self._buffer = data
        elif isinstance(self._buffer, bytearray):
            self._buffer += data
        else:
            self._buffer = bytearray(self._buffer) + data
        try:
            self._take_messages()
        except RefusedError as error:
            self.give_up(error.code, error.details)
            return
        if not self._messages or not self._handler.request_streaming:
            self.credit()
        self._wake_reader()

    def _take_messages(self) -> None:
        while len(self._buffer) >= _PREFIX.size:
            compressed, size = _PREFIX.unpack_from(self._buffer)
            end = _PREFIX.size + size
            if size > MOST_MESSAGE_BYTES:
                raise _too_large("a message")
            if len(self._buffer) < end:
                break
            message = bytes(memoryview(self._buffer)[_PREFIX.size : end])
            self._buffer = self._buffer[end:]
            self._messages.append(self._inflated(message) if compressed else message)
        waiting = len(self._buffer)
        self.connection.unfinished += waiting - self.unfinished
        self.unfinished = waiting
        if self.connection.unfinished > MOST_UNFINISHED_BYTES:
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much of unfinished requests on this connection")

    def _inflated(self, message: bytes) -> bytes:
        bits = _WINDOW_BITS.get(self._encoding)
        if bits is None:
            raise RefusedError(grpc.StatusCode.INTERNAL, "a message is compressed, and the request does not say how")
        inflater = zlib.decompressobj(bits)
        try:
            inflated = inflater.decompress(message, MOST_MESSAGE_BYTES + 1)
        except zlib.error as error:
            raise RefusedError(grpc.StatusCode.INTERNAL, "a compressed message can not be read") from error
        if len(inflated) > MOST_MESSAGE_BYTES:
            raise _too_large("a message")
        if not inflater.eof:
            raise RefusedError(grpc.StatusCode.INTERNAL, "a compressed message is cut off")
        return inflated

    def request_arrived(self) -> None:
        if self._handler.request_streaming:
            self._wake_reader()
        elif self._buffer or len(self._messages) != 1:
            self._end(grpc.StatusCode.INTERNAL, "the request is not one whole message")
        else:
            self._start(self._messages.popleft())

    async def _requests(self) -> AsyncIterator[Any]:
        """The messages of a request that is a stream."""
        while True:
            while self._messages:
                message = self._messages.popleft()
                if not self._messages:
                    self.credit()
                yield self._handler.request_deserializer(message)
            if self.request_ended:
                if self._buffer:
                    await self.abort(grpc.StatusCode.INTERNAL, "the last message is cut off")
                return
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def aborted(self, reason: str) -> None:
        if self._task is not None:
            self._task.cancel()

    def ended(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._book.ended(self)

    # The handler runs

    def _start(self, request: Any) -> None:
        self._task = task = asyncio.get_running_loop().create_task(self._run(request))
        self._book.tasks.add(task)
        task.add_done_callback(self._book.tasks.discard)

    async def _run(self, request: Any) -> None:
        handler = self._handler
        try:
            if not handler.request_streaming:
                request = handler.request_deserializer(request)
            if handler.response_streaming:
                answering = handler.stream_stream if handler.request_streaming else handler.unary_stream
                answers = answering(request, self)
                if hasattr(answers, "__aiter__"):
                    async with contextlib.aclosing(answers):
                        async for answer in answers:
                            await self.write(answer)
                else:
                    await answers
                self._complete()
            else:
                answering = handler.stream_unary if handler.request_streaming else handler.unary_unary
                await self._complete_with(await answering(request, self))
        except grpc.aio.AbortError:
            self._end(*self._status)
        except RefusedError as error:
            self._end(error.code, error.details)
        except ConnectionError:
            pass  # nobody is there to be told
        except Exception as error:  # noqa: BLE001 - logged and answered: whatever it was, the client must not wait
            log.error("handler_failed", error=error, method=self.method)
            self._end(grpc.StatusCode.UNKNOWN, "")

    def give_up(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call from outside its handler, which is cancelled."""
        if not self.is_closed:
            self._end(code, details)
            if self._task is not None:
                self._task.cancel()

    # The answer

    async def write(self, message: Any) -> None:
        """One message of an answer that is a stream; returns when the connection has taken it."""
        data = self._framed(message)
        head = self._head()
        if not self.try_send(head, data):
            await self.send(head, data)

    def _complete(self) -> None:
        if self._status[0] is not grpc.StatusCode.OK:
            self._end(*self._status)
        elif not self.is_closed:
            self.succeeded = True
            self.connection.push(self._head() + self._trailers(_OK))
            self.finished()

    async def _complete_with(self, answer: Any) -> None:
        """The only message and the status."""
        if self._status[0] is not grpc.StatusCode.OK:
            self._end(*self._status)
            return
        data = self._framed(answer)
        head, tail = self._head(), self._trailers(_OK)
        if not self.try_send(head, data, tail):
            await self.send(head, data, tail)
        self.succeeded = True
        self.finished()

    def _framed(self, message: Any) -> bytes:
        payload: bytes = self._handler.response_serializer(message)
        if len(payload) > MOST_MESSAGE_BYTES:
            raise _too_large("the answer")
        return _PREFIX.pack(0, len(payload)) + payload

    def _head(self) -> bytes:
        """The frame that begins the answer, once."""
        if self.is_closed:
            raise asyncio.CancelledError  # the handler is cancelled already; it only had not to wait yet
        if self._head_sent:
            return b""
        self._head_sent = True
        return frames.frame(Kind.HEADERS, Flag.END_HEADERS, self.stream_id, _HEAD)

    def _trailers(self, block: bytes) -> bytes:
        return frames.headers_frames(self.stream_id, block, end_stream=True)

    def _end(self, code: grpc.StatusCode, details: str, trailers: Metadata = ()) -> None:
        """A status without a message."""
        if self.is_closed:
            return
        if self.is_sending:
            self.finished(code=ErrorCode.CANCEL)  # within a message, nothing else can be said
            return
        fields = [(b"grpc-status", str(code.value[0]).encode())]
        if details:
            fields.append((b"grpc-message", _percent_encoded(details)))
        fields += [_encoded(*each) for each in trailers]
        block = headers.encode(fields)
        self.connection.push(self._trailers(block if self._head_sent else _HEAD + block))
        self._head_sent = True
        self.finished()

    def _answer_http(self, status: int) -> None:
        self.connection.push(self._trailers(headers.encode_status(status)))
        self.finished()

    # The context, as grpc.aio has it

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return [
            (name.decode("latin-1"), _from_base64(value) if name.endswith(b"-bin") else value.decode("latin-1"))
            for name, value in self._fields if name not in _OF_THE_PROTOCOL
        ]

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline, if it has one."""
        return None if self._deadline is None else max(0.0, self._deadline - asyncio.get_running_loop().time())

    def set_code(self, code: grpc.StatusCode) -> None:
        self._status = (code, self._status[1], self._status[2])

    def set_details(self, details: str) -> None:
        self._status = (self._status[0], details, self._status[2])

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self._status = (code, details, trailing_metadata)
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: Any) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata or ())


def _too_large(what: str) -> RefusedError:
    return RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{what} is larger than {MOST_MESSAGE_BYTES} bytes")


def _percent_encoded(text: str) -> bytes:
    return b"".join(
        bytes((each,)) if 0x20 <= each <= 0x7E and each != 0x25 else b"%%%02X" % each
        for each in text.encode("utf-8", "replace")
    )


def _encoded(name: str, value: str | bytes) -> tuple[bytes, bytes]:
    raw = value.encode("latin-1", "replace") if isinstance(value, str) else value
    return name.encode("ascii"), base64.b64encode(raw).rstrip(b"=") if name.endswith("-bin") else raw


def _from_base64(value: bytes) -> bytes:
    """Padded or not; what can not be read is empty."""
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return b""
