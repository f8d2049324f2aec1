"""The one interceptor: request id, authentication, scope, validation, errors, access log and metrics.

It is one wrapper and not a chain of them because every layer costs microseconds on every call; each concern has its own
module. All four kinds of handler are served. A streaming servicer of ours is an async generator; the wrapper writes
what it yields, so that a message passes no further layer.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError, InvalidField
from servicekit.core.ids import IdSource
from servicekit.rpc.auth import Authenticator, Principal
from servicekit.rpc.call_info import CallInfo, set_current_call
from servicekit.rpc.grpc_call import Call
from servicekit.rpc.grpc_server import GrpcServer
from servicekit.rpc.status import CODE_OF_REASON, status_of
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry import tracing
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import RpcMetrics

log = EventLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
MOST_REQUEST_ID_LENGTH = 128
QUIET_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""Probed every few seconds; their successes would drown everything else in the access log."""
NOBODY = Principal("", frozenset())
Context = Call
Handler = Any
"""grpc.RpcMethodHandler: its stubs describe synchronous handlers only."""


class Undecodable:
    """Stands for a request whose bytes are no message of its type, e.g. invalid UTF-8 in a string."""


class CallInterceptor:
    """Wraps every handler. `scopes` maps full method names to scopes; a method without one can not be served."""

    def __init__(
        self, *, authenticator: Authenticator, scopes: Mapping[str, str | None], validator: RequestValidator,
        metrics: RpcMetrics, clock: Clock, ids: IdSource, log_successes: bool = True,
    ) -> None:
        self._authenticator = authenticator
        self._scopes = scopes
        self._clock = clock
        self._log_successes = log_successes
        self._request_ids = (f"{prefix}-{number:x}" for prefix in [ids.new_id()] for number in itertools.count(1))
        self.validator = validator
        self.metrics = metrics

    def guard(self, server: GrpcServer) -> GuardedServer:
        """The server to add servicers to, instead of `server` itself."""
        return GuardedServer(server, self)

    def wrap(self, method: str, handler: Handler) -> Handler:
        """The handler with everything around it. Raises KeyError for a method without a scope."""
        return _MethodWrapper(self, method, self._scopes[method], handler).handler()

    def admit(self, method: str, scope: str | None, context: Context) -> tuple[CallInfo, DomainError | None]:
        """The call's facts, and why it is refused, if it is."""
        metadata = dict(context.invocation_metadata() or ())
        request_id = str(metadata.get(REQUEST_ID_KEY) or "")[:MOST_REQUEST_ID_LENGTH] or next(self._request_ids)
        started = self._clock.monotonic()
        remaining = context.time_remaining()
        deadline = None if remaining is None else started + remaining
        principal = NOBODY
        refusal: DomainError | None = None
        if scope is not None:
            try:
                authorization = metadata.get("authorization")
                principal = self._authenticator.authenticate(None if authorization is None else str(authorization))
                principal.require(scope)
            except DomainError as error:
                refusal = error
        traceparent = str(metadata.get(tracing.TRACEPARENT) or "")[:MOST_REQUEST_ID_LENGTH]
        span = None
        if tracing.is_on() and method not in QUIET_METHODS:
            span = tracing.start(
                method.removeprefix("/"), kind=tracing.SpanKind.SERVER, parent=traceparent,
                attributes={"rpc.system": "grpc", "rpc.method": method.removeprefix("/")},
            )
            traceparent = tracing.traceparent_of(span, traceparent)
        call = CallInfo(method, request_id, principal, deadline, started, traceparent, span)
        set_current_call(call)
        return call, refusal

    def check(self, request: Any) -> None:
        if isinstance(request, Undecodable):
            raise InvalidField.of("", "the request is not a valid message of its type")
        self.validator.check(request)

    def seconds_of(self, call: CallInfo) -> float:
        return self._clock.monotonic() - call.started

    def log(self, call: CallInfo, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        succeeded = code is grpc.StatusCode.OK
        if not succeeded or (self._log_successes and call.method not in QUIET_METHODS):
            log.info(
                "rpc", method=call.method, code=code.name, reason=reason, milliseconds=round(seconds * 1000, 2),
                request_id=call.request_id, principal=call.principal.name, **_trace_of(call),
            )

    def classify(self, call: CallInfo, error: BaseException) -> tuple[grpc.StatusCode, DomainError | None]:
        """The code of an error, and what the client is told; None when the client is gone."""
        if isinstance(error, DomainError):
            return CODE_OF_REASON[error.reason], error
        if isinstance(error, asyncio.CancelledError):
            late = call.deadline is not None and self._clock.monotonic() >= call.deadline - 0.01
            return (grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED), None
        log.error("internal_error", error=error, method=call.method, request_id=call.request_id)
        return grpc.StatusCode.INTERNAL, DomainError(
            "something went wrong here; the log of the service has the details under this request id"
        )


def _trace_of(call: CallInfo) -> dict[str, str]:
    """The trace's id, as logs and traces find each other by it."""
    return {"trace_id": call.traceparent[3:35]} if len(call.traceparent) > 35 else {}


class GuardedServer:
    """Takes servicers for a server, as generated code adds them, and wraps each handler once."""

    def __init__(self, server: GrpcServer, interceptor: CallInterceptor) -> None:
        self._server = server
        self._interceptor = interceptor

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """What generated code calls with every service; nothing is served without passing here."""
        wrapped = {name: self._interceptor.wrap(f"/{service}/{name}", each) for name, each in handlers.items()}
        self._server.add_registered_method_handlers(service, wrapped)

    def add_generic_rpc_handlers(self, handlers: Sequence[Handler]) -> None:
        """Generated code calls this too, with the same handlers unwrapped; they are left out."""


class _MethodWrapper:
    """One method's handler with everything around it."""

    def __init__(self, interceptor: CallInterceptor, method: str, scope: str | None, handler: Handler) -> None:
        self._interceptor = interceptor
        self._method = method
        self._scope = scope
        self._inner = handler
        metrics = interceptor.metrics
        self._running = metrics.running
        self._seconds = metrics.seconds.labels(method)
        self._handled_ok = metrics.handled.labels(method, grpc.StatusCode.OK.name)

    def handler(self) -> Handler:
        inner = self._inner
        coders = {
            "request_deserializer": _tolerant(inner.request_deserializer),
            "response_serializer": inner.response_serializer,
        }
        if inner.request_streaming and inner.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream_stream, **coders)
        if inner.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._stream_unary, **coders)
        if inner.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._unary_stream, **coders)
        return grpc.unary_unary_rpc_method_handler(self._unary_unary, **coders)

    async def _run(self, context: Context, body: Callable[[], Awaitable[Any]]) -> Any:
        call, refusal = self._interceptor.admit(self._method, self._scope, context)
        self._running.inc()
        code, reason = grpc.StatusCode.OK, ""
        try:
            if refusal is not None:
                raise refusal
            return await body()
        except grpc.aio.AbortError:
            code = grpc.StatusCode.UNKNOWN
            raise
        except BaseException as error:
            code, told = self._interceptor.classify(call, error)
            if told is None:
                raise
            reason = told.reason
            status = rpc_status.to_status(status_of(told, request_id=call.request_id))
            await context.abort_with_status(status)
        finally:
            self._end(call, code, reason)

    def _end(self, call: CallInfo, code: grpc.StatusCode, reason: str) -> None:
        seconds = self._interceptor.seconds_of(call)
        self._running.dec()
        self._seconds.observe(seconds)
        if code is grpc.StatusCode.OK:
            self._handled_ok.inc()
        else:
            self._interceptor.metrics.handled.labels(self._method, code.name).inc()
        self._interceptor.log(call, code, reason, seconds)
        if call.span is not None:
            error = reason or ("" if code is grpc.StatusCode.OK else code.name)
            tracing.end(call.span, error=error, attributes={"rpc.grpc.status_code": code.value[0]})

    async def _unary_unary(self, request: Any, context: Context) -> Any:
        async def body() -> Any:
            self._interceptor.check(request)
            return await self._inner.unary_unary(request, context)

        return await self._run(context, body)

    async def _stream_unary(self, requests: AsyncIterator[Any], context: Context) -> Any:
        async def body() -> Any:
            return await self._inner.stream_unary(self._checked(requests), context)

        return await self._run(context, body)

    async def _unary_stream(self, request: Any, context: Context) -> None:
        async def body() -> None:
            self._interceptor.check(request)
            await self._write_all(self._inner.unary_stream(request, context), context)

        await self._run(context, body)

    async def _stream_stream(self, requests: AsyncIterator[Any], context: Context) -> None:
        async def body() -> None:
            await self._write_all(self._inner.stream_stream(self._checked(requests), context), context)

        await self._run(context, body)

    async def _checked(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._interceptor.check(request)
            yield request

    @staticmethod
    async def _write_all(responses: Any, context: Context) -> None:
        if not hasattr(responses, "__aiter__"):
            await responses  # a handler that writes by itself, as those of gRPC's own packages may
            return
        try:
            async for response in responses:
                await context.write(response)
        finally:
            # Runs the generator's own cleanup at once when the client leaves, not at some garbage collection.
            await responses.aclose()


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except DecodeError:
            return Undecodable()

    return tolerant
