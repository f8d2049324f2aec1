"""The one interceptor: request id, authentication, scope, validation, errors, access log and metrics.

It is one wrapper and not a chain of them because every layer costs microseconds on every call; each concern has its own
module. All four kinds of handler are served. A streaming servicer is an async generator; the wrapper writes what it
yields, so that a message passes no further layer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
from servicekit.rpc.status import CODE_OF_REASON, status_of
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import RpcMetrics

log = EventLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
MOST_REQUEST_ID_LENGTH = 128
QUIET_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""Probed every few seconds; their successes would drown everything else in the access log."""
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""grpc.RpcMethodHandler: its stubs describe synchronous handlers only."""


class Undecodable:
    """Stands for a request whose bytes are no message of its type, e.g. invalid UTF-8 in a string."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler. `scopes` maps full method names to scopes; an RPC without one is refused."""

    def __init__(
        self, *, authenticator: Authenticator, scopes: Mapping[str, str | None], validator: RequestValidator,
        metrics: RpcMetrics, clock: Clock, ids: IdSource, log_successes: bool = True,
    ) -> None:
        self._authenticator = authenticator
        self._scopes = scopes
        self._validator = validator
        self._metrics = metrics
        self._clock = clock
        self._ids = ids
        self._log_successes = log_successes
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = _MethodWrapper(self, method, handler).handler()
        return wrapped

    def admit(self, method: str, context: Context) -> tuple[CallInfo, DomainError | None]:
        """The call's facts, and why it is refused, if it is."""
        metadata = dict(context.invocation_metadata() or ())
        request_id = str(metadata.get(REQUEST_ID_KEY) or "")[:MOST_REQUEST_ID_LENGTH] or str(self._ids.new_id())
        started = self._clock.monotonic()
        remaining = context.time_remaining()
        deadline = None if remaining is None else started + remaining
        principal = Principal("", frozenset())
        refusal: DomainError | None = None
        scope = self._scopes[method]
        if scope is not None:
            try:
                authorization = metadata.get("authorization")
                principal = self._authenticator.authenticate(None if authorization is None else str(authorization))
                principal.require(scope)
            except DomainError as error:
                refusal = error
        call = CallInfo(method, request_id, principal, deadline, started)
        set_current_call(call)
        self._metrics.running.inc()
        return call, refusal

    def check(self, request: Any) -> None:
        if isinstance(request, Undecodable):
            raise InvalidField.of("", "the request is not a valid message of its type")
        self._validator.check(request)

    def end(self, call: CallInfo, code: grpc.StatusCode, reason: str) -> None:
        seconds = self._clock.monotonic() - call.started
        self._metrics.running.dec()
        self._metrics.handled.labels(call.method, code.name).inc()
        self._metrics.seconds.labels(call.method).observe(seconds)
        succeeded = code is grpc.StatusCode.OK
        if not succeeded or (self._log_successes and call.method not in QUIET_METHODS):
            log.info(
                "rpc", method=call.method, code=code.name, reason=reason, milliseconds=round(seconds * 1000, 2),
                request_id=call.request_id, principal=call.principal.name,
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


class _MethodWrapper:
    """One method's handler with everything around it."""

    def __init__(self, interceptor: CallInterceptor, method: str, handler: Handler) -> None:
        self._interceptor = interceptor
        self._method = method
        self._inner = handler

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
        call, refusal = self._interceptor.admit(self._method, context)
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
            self._interceptor.end(call, code, reason)

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
