"""An RPC that is served: one HTTP/2 stream, its deadline and status, and the context of its handler."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from servicekit.http2 import frames, headers
from servicekit.http2.connection import MOST_UNFINISHED_BYTES
from servicekit.http2.frames import ErrorCode, Flag, Kind
from servicekit.http2.headers import RequestHeaders
from servicekit.http2.server import ServedStream, ServerConnection
from servicekit.rpc import grpc_wire
from servicekit.rpc.grpc_wire import PREFIX, WINDOW_BITS, Metadata, RefusedError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

MOST_MESSAGE_BYTES = 32 * 1024 * 1024
_HEAD = headers.encode_status(200) + headers.encode([(b"content-type", b"application/grpc")])
_OK = headers.encode([(b"grpc-status", b"0")])
_ACCEPTED_ENCODINGS = "identity, deflate, gzip"

Handler = Any
"""grpc.RpcMethodHandler with functions for asyncio."""


class CallBook(Protocol):
    """What a call knows of its server."""

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """By full method name."""

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """Handlers that run, also those whose client is gone."""

    def ended(self, call: Call) -> None: ...


class CallHeaders:
    """What the headers of a request say of a call; the same for all calls with the same headers."""

    def __init__(self, request: RequestHeaders) -> None:
        self.method = request.path.decode("latin-1")
        self.http_status = 0
        """When it is no request of gRPC: what it is answered with, as HTTP demands."""
        self.timeout: float | None = None
        self.encoding = b"identity"
        self.refusal: RefusedError | None = None
        self.metadata = grpc_wire.metadata_from_fields(request.fields)
        content_type = b""
        for name, value in request.fields:
            if name == b"content-type":
                content_type = value
            elif name == b"grpc-encoding":
                self.encoding = value
            elif name == b"grpc-timeout":
                try:
                    self.timeout = grpc_wire.timeout_from_bytes(value)
                except RefusedError as error:
                    self.refusal = error
        if request.method != b"POST":
            self.http_status = 405
        elif not content_type.startswith(b"application/grpc"):
            self.http_status = 415
        elif self.encoding != b"identity" and self.encoding not in WINDOW_BITS:
            self.refusal = RefusedError(
                grpc.StatusCode.UNIMPLEMENTED, "the request's encoding is not known here",
                [("grpc-accept-encoding", _ACCEPTED_ENCODINGS)],
            )


class Call(ServedStream):
    """One RPC. Handlers get it as their context: it has what they, and the services of gRPC's own packages, use of
    grpc.aio.ServicerContext."""

    __slots__ = (
        "_book", "_buffer", "_deadline", "_handler", "_head_sent", "_messages", "_reader", "_status", "_task", "_timer",
        "_told", "succeeded",
    )

    def __init__(
        self, connection: ServerConnection, stream_id: int, request: RequestHeaders, book: CallBook
    ) -> None:
        super().__init__(connection, stream_id)
        if request.meaning is None:
            request.meaning = CallHeaders(request)
        self._told: CallHeaders = request.meaning
        self.succeeded = False
        self._book = book
        self._handler: Handler = None
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
        told = self._told
        if told.http_status:
            self.connection.push(self._trailers(headers.encode_status(told.http_status)))
            self.answered()
            return
        if told.timeout is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.time() + told.timeout
            self._timer = loop.call_at(
                self._deadline, self.give_up, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed"
            )
        self._handler = self._book.handlers.get(told.method)
        if told.refusal is not None:
            self._end(told.refusal.code, told.refusal.details, told.refusal.trailers)
        elif self._handler is None:
            self._end(grpc.StatusCode.UNIMPLEMENTED, "there is no such method here")
        elif self._handler.request_streaming:
            self._start(self._requests())

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
        while len(self._buffer) >= PREFIX.size:
            compressed, size = PREFIX.unpack_from(self._buffer)
            end = PREFIX.size + size
            if size > MOST_MESSAGE_BYTES:
                raise grpc_wire.too_large("a message", MOST_MESSAGE_BYTES)
            if len(self._buffer) < end:
                break
            message = bytes(memoryview(self._buffer)[PREFIX.size : end])
            self._buffer = self._buffer[end:]
            if compressed:
                message = grpc_wire.inflated(message, self._told.encoding, most=MOST_MESSAGE_BYTES)
            self._messages.append(message)
        waiting = len(self._buffer)
        self.connection.unfinished += waiting - self.unfinished
        self.unfinished = waiting
        if self.connection.unfinished > MOST_UNFINISHED_BYTES:
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much of unfinished requests on this connection")

    def input_complete(self) -> None:
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
            if self.input_ended:
                if self._buffer:
                    await self.abort(grpc.StatusCode.INTERNAL, "the last message is cut off")
                return
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def aborted(self, reason: str, code: ErrorCode | None) -> None:
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
            log.error("handler_failed", error=error, method=self._told.method)
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
            self.answered()

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
        self.answered()

    def _framed(self, message: Any) -> bytes:
        payload: bytes = self._handler.response_serializer(message)
        if len(payload) > MOST_MESSAGE_BYTES:
            raise grpc_wire.too_large("the answer", MOST_MESSAGE_BYTES)
        return grpc_wire.framed(payload)

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
            self.reset(ErrorCode.CANCEL)  # within a message, nothing else can be said
            return
        fields = [(b"grpc-status", str(code.value[0]).encode())]
        if details:
            fields.append((b"grpc-message", grpc_wire.message_to_bytes(details)))
        block = headers.encode([*fields, *grpc_wire.metadata_to_fields(trailers)])
        self.connection.push(self._trailers(block if self._head_sent else _HEAD + block))
        self._head_sent = True
        self.answered()

    # The context, as grpc.aio has it

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return self._told.metadata

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
