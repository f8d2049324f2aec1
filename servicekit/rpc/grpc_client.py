"""A channel for the unary calls between our services, over `servicekit.http2`.

grpc.aio's channel costs 0.2 ms of CPU a call, and a thread that fights for the interpreter's lock with the event loop;
a hold is such a call before every model is asked. This one behaves as its does where our services look: calls fail at
once while a server is known to be away, a connection is made anew after pauses that grow, a call that a server has not
touched is sent again, and errors are grpc.aio.AioRpcError. Streams, load balancing and service configs it has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, Self, cast

import grpc
import grpc.aio

from servicekit.dialing import AddressInfo, dial
from servicekit.http2 import frames, headers
from servicekit.http2.client import AskedStream, ClientConnection
from servicekit.http2.frames import ErrorCode, Flag, Kind
from servicekit.http2.headers import Fields
from servicekit.rpc import grpc_wire
from servicekit.rpc.grpc_wire import PREFIX
from servicekit.settings import DNS, split_address

MOST_ANSWER_BYTES = 64 * 1024 * 1024
CONNECT_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 2.0
PAUSE_GROWTH = 1.6
JITTER = 0.2
MOST_TRIES = 3
"""Of a call that servers give back untouched."""
_FIELDS = headers.encode([
    (b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"user-agent", b"creditmesh"),
])
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_CODE_OF_HTTP = {
    401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED, 404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE, 502: grpc.StatusCode.UNAVAILABLE, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}
"""https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md"""
_CODE_OF_RESET = {
    ErrorCode.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE, ErrorCode.CANCEL: grpc.StatusCode.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_END = Flag.END_STREAM

Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]


class _Untouched(Exception):
    """The server has not looked at the call."""


def _error(
    code: grpc.StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=details)


class AskedCall(AskedStream):
    """One unary call that was sent; `answer` is its message."""

    __slots__ = ("_buffer", "_is_head_seen", "answer")

    def __init__(self, connection: ClientConnection) -> None:
        super().__init__(connection, 0)
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()
        self._is_head_seen = False

    def fields_arrived(self, fields: Fields, *, ends: bool) -> None:
        found = dict(fields)
        if not self._is_head_seen:
            self._is_head_seen = True
            status = found.get(b":status", b"")
            if status != b"200" or not found.get(b"content-type", b"").startswith(b"application/grpc"):
                code = _CODE_OF_HTTP.get(int(status) if status.isdigit() else 0, grpc.StatusCode.UNKNOWN)
                self.fail(_error(code, "what answered is no gRPC server"), reset=not ends)
                return
        if ends:
            self._finish(found, fields)

    def data_arrived(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MOST_ANSWER_BYTES + PREFIX.size:
            refusal = grpc_wire.too_large("the answer", MOST_ANSWER_BYTES)
            self.fail(_error(refusal.code, refusal.details))
        else:
            self.credit()

    def input_complete(self) -> None:
        self.fail(_error(grpc.StatusCode.INTERNAL, "the answer ended without a status"))

    def aborted(self, reason: str, code: ErrorCode | None) -> None:
        status = grpc.StatusCode.UNAVAILABLE if code is None else _CODE_OF_RESET.get(code, grpc.StatusCode.INTERNAL)
        self._give(_error(status, reason))

    def untouched(self) -> None:
        self._give(_Untouched())

    def expire(self) -> None:
        self.fail(_error(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed"))

    def fail(self, error: Exception, *, reset: bool = True) -> None:
        """Nothing more is wanted of the server."""
        if reset:
            self.reset(ErrorCode.CANCEL)
        else:
            self.connection.forget(self)
        self._give(error)

    def _finish(self, found: dict[bytes, bytes], fields: Fields) -> None:
        self.connection.forget(self)
        status = found.get(b"grpc-status", b"")
        code = _CODES.get(int(status), grpc.StatusCode.UNKNOWN) if status.isdigit() else None
        if code is None:
            self._give(_error(grpc.StatusCode.INTERNAL, "the answer ended without a status"))
        elif code is not grpc.StatusCode.OK:
            details = grpc_wire.message_from_bytes(found.get(b"grpc-message", b""))
            self._give(_error(code, details, grpc_wire.metadata_from_fields(fields)))
        else:
            self._give(self._message())

    def _message(self) -> bytes | Exception:
        """The only one of a good answer."""
        if len(self._buffer) >= PREFIX.size:
            compressed, size = PREFIX.unpack_from(self._buffer)
            if not compressed and len(self._buffer) == PREFIX.size + size:
                return bytes(memoryview(self._buffer)[PREFIX.size :])
        return _error(grpc.StatusCode.INTERNAL, "the answer is not one whole message")

    def _give(self, result: bytes | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(result, Exception):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class UnaryChannel(grpc.aio.Channel):
    """To `host:port`; `tls` as `client_tls` makes it. It connects when it is first used."""

    def __init__(self, target: str, *, tls: ssl.SSLContext | None = None) -> None:
        address = target.removeprefix(DNS)
        self._host, self._port = split_address(address)
        self._authority = address.encode()
        self._tls = tls
        self._connection: ClientConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_closed = False
        self._pause = 0.0
        self._retry_at = 0.0
        self._trouble = ""

    async def ask(
        self, head: bytes, message: bytes, *, timeout: float | None, metadata: Iterable[tuple[str, str | bytes]]
    ) -> bytes:
        """One unary call. Raises grpc.aio.AioRpcError."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        block = head + headers.encode(grpc_wire.metadata_to_fields(metadata)) if metadata else head
        body = grpc_wire.framed(message)
        for _ in range(MOST_TRIES):
            try:
                async with asyncio.timeout_at(deadline):
                    connection = await self._usable()
            except TimeoutError:
                raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "there was no connection in time") from None
            call = AskedCall(connection)
            connection.begin(call)
            timer = None if deadline is None else loop.call_at(deadline, call.expire)
            try:
                await self._send(call, block, body, None if deadline is None else deadline - loop.time())
                return await call.answer
            except _Untouched:
                continue
            except asyncio.CancelledError:
                call.reset(ErrorCode.CANCEL)
                raise
            finally:
                if timer is not None:
                    timer.cancel()
        raise _error(grpc.StatusCode.UNAVAILABLE, "the server takes no calls")

    @staticmethod
    async def _send(call: AskedCall, block: bytes, body: bytes, seconds: float | None) -> None:
        if seconds is not None:
            block += headers.encode([(b"grpc-timeout", grpc_wire.timeout_to_bytes(max(seconds, 0.0)))])
        head = frames.headers_frames(call.stream_id, block, end_stream=False)
        tail = frames.frame(Kind.DATA, _END, call.stream_id)
        if not call.try_send(head, body, tail):
            with contextlib.suppress(ConnectionError):  # `answer` says what happened
                await call.send(head, body, tail)

    # Connecting

    async def _usable(self) -> ClientConnection:
        """A connection with a place for one more call."""
        while True:
            connection = self._connection
            if connection is None or not connection.usable:
                self._try_to_connect()
                if self._connecting is None:
                    raise _error(grpc.StatusCode.UNAVAILABLE, self._trouble)
                await asyncio.shield(self._connecting)
            elif await connection.place():
                return connection

    def _try_to_connect(self) -> None:
        """Begins to, unless that has just failed."""
        loop = asyncio.get_running_loop()
        if self._is_closed:
            self._trouble = "the channel is closed"
        elif self._connecting is None and loop.time() >= self._retry_at:
            self._connecting = loop.create_task(self._connect(), name=f"connect-{self._host}:{self._port}")

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                addresses = cast("list[AddressInfo]", found)
                connection = await dial(ClientConnection, addresses, host=self._host, tls=self._tls)
                await connection.greeted()
        except (OSError, TimeoutError, UnicodeError) as error:
            self._pause = min(self._pause * PAUSE_GROWTH or FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS)
            self._retry_at = loop.time() + self._pause * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
            self._trouble = f"no connection to {self._host}:{self._port}: {_reason(error)}"
        else:
            self._connection, self._pause = connection, 0.0
        finally:
            self._connecting = None

    # grpc.aio.Channel

    def unary_unary(
        self, method: str, request_serializer: Serializer | None = None,
        response_deserializer: Deserializer | None = None, _registered_method: bool | None = False,
    ) -> Any:
        head = headers.encode_request(method.encode(), self._authority, secure=self._tls is not None) + _FIELDS
        return _UnaryMethod(self, head, request_serializer or bytes, response_deserializer or bytes)

    def unary_stream(self, method: str, *_: Any, **__: Any) -> Any:
        return _not_unary(method)

    def stream_unary(self, method: str, *_: Any, **__: Any) -> Any:
        return _not_unary(method)

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Any:
        return _not_unary(method)

    async def close(self, grace: float | None = None) -> None:
        """Calls that run end as UNAVAILABLE."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        if self._is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        if self._connection is not None and self._connection.usable:
            return grpc.ChannelConnectivity.READY
        if try_to_connect:
            self._try_to_connect()
        if self._connecting is not None:
            return grpc.ChannelConnectivity.CONNECTING
        return grpc.ChannelConnectivity.TRANSIENT_FAILURE if self._trouble else grpc.ChannelConnectivity.IDLE

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        while self.get_state() is last_observed_state:  # noqa: ASYNC110 - asked for by the base class alone
            await asyncio.sleep(FIRST_PAUSE_SECONDS)

    async def channel_ready(self) -> None:
        while self.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            if self._connecting is not None:
                await asyncio.shield(self._connecting)
            else:
                await asyncio.sleep(FIRST_PAUSE_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _UnaryMethod:
    """What a stub calls."""

    def __init__(self, channel: UnaryChannel, head: bytes, serialize: Serializer, deserialize: Deserializer) -> None:
        self._channel = channel
        self._head = head
        self._serialize = serialize
        self._deserialize = deserialize

    async def __call__(
        self, request: Any, *, timeout: float | None = None, metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> Any:
        answer = await self._channel.ask(self._head, self._serialize(request), timeout=timeout, metadata=metadata)
        return self._deserialize(answer)


def _not_unary(method: str) -> Callable[..., Awaitable[Any]]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"this channel is for unary calls, and {method} is a stream")

    return refuse


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def client_tls(ca: Any, certificate: Any = None, key: Any = None) -> ssl.SSLContext:
    """From PEM files: servers of that authority; a certificate is shown when there is one."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context
