"""The interceptor around all four kinds of handler, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from creditmesh.tokenstore.v1 import balance_service_pb2 as messages
from prometheus_client import CollectorRegistry

from servicekit.core.clock import SystemClock
from servicekit.core.errors import DomainError, InvalidField
from servicekit.core.ids import RandomIdSource
from servicekit.rpc.auth import NoAuthentication
from servicekit.rpc.call_info import current_call
from servicekit.rpc.grpc_server import GrpcServer, listen
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry.metrics import RpcMetrics
from tests.support.errors import reason_of, violations_of

Request, Response = messages.GetBalanceRequest, messages.GetBalanceResponse
KINDS = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"]


class NotHere(DomainError):
    """Stands for any domain error."""

    reason = "MODEL_NOT_FOUND"


def behave(request: messages.GetBalanceRequest) -> messages.GetBalanceResponse:
    if request.user_id == "missing":
        raise NotHere("no such thing", thing="x")
    if request.user_id == "bug":
        raise KeyError("a secret")
    assert current_call().request_id
    return Response(balance={"user_id": request.user_id})


class Handlers:
    """One handler of each kind; `ended` tells how streams ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def unary_unary(self, request: Any, context: Any) -> Any:
        return behave(request)

    async def unary_stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield behave(request)
            if request.user_id == "endless":
                while True:
                    await asyncio.sleep(0.01)
                    yield behave(request)
        except (GeneratorExit, asyncio.CancelledError):
            self.ended.append("cancelled")
            raise

    async def stream_unary(self, requests: Any, context: Any) -> Any:
        return [behave(request) async for request in requests][-1]

    async def stream_stream(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield behave(request)


@pytest.fixture
async def served() -> AsyncIterator[tuple[grpc.aio.Channel, Handlers, CollectorRegistry]]:
    handlers, registry = Handlers(), CollectorRegistry()
    interceptor = CallInterceptor(
        authenticator=NoAuthentication(), scopes={f"/test/{kind}": "llm.call" for kind in KINDS},
        validator=RequestValidator(), metrics=RpcMetrics(registry), clock=SystemClock(), ids=RandomIdSource(),
    )
    sockets = listen("127.0.0.1:0")
    server = GrpcServer(sockets)
    coders: Any = {"request_deserializer": Request.FromString, "response_serializer": Response.SerializeToString}
    interceptor.guard(server).add_registered_method_handlers("test", {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(handlers.unary_unary, **coders),  # type: ignore[arg-type]
        "UnaryStream": grpc.unary_stream_rpc_method_handler(handlers.unary_stream, **coders),  # type: ignore[arg-type]
        "StreamUnary": grpc.stream_unary_rpc_method_handler(handlers.stream_unary, **coders),  # type: ignore[arg-type]
        "StreamStream": grpc.stream_stream_rpc_method_handler(handlers.stream_stream, **coders),  # type: ignore[arg-type]
    })
    port = sockets[0].getsockname()[1]
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, handlers, registry
    await server.stop(None)


async def call(channel: grpc.aio.Channel, kind: str, user_id: str) -> list[str]:
    request: Any = Request(user_id=user_id)
    name = f"/test/{kind}"
    coders: Any = {"request_serializer": Request.SerializeToString, "response_deserializer": Response.FromString}
    if kind == "UnaryUnary":
        return [(await channel.unary_unary(name, **coders)(request)).balance.user_id]
    if kind == "StreamUnary":
        return [(await channel.stream_unary(name, **coders)(iter([request]))).balance.user_id]
    if kind == "UnaryStream":
        return [answer.balance.user_id async for answer in channel.unary_stream(name, **coders)(request)]
    return [answer.balance.user_id async for answer in channel.stream_stream(name, **coders)(iter([request]))]


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_answers_maps_errors_and_counts(served: Any, kind: str) -> None:
    channel, _, registry = served
    assert await call(channel, kind, "alice") == ["alice"]
    for user_id, code, reason in (
        ("missing", grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"), ("bug", grpc.StatusCode.INTERNAL, "INTERNAL"),
        ("", grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, kind, user_id)
        assert (caught.value.code(), reason_of(caught.value)) == (code, reason)
        assert "secret" not in str(caught.value.details())
        if not user_id:
            assert violations_of(caught.value) == ["user_id"]
    for code_name in ("OK", "NOT_FOUND", "INTERNAL", "INVALID_ARGUMENT"):
        labels = {"method": f"/test/{kind}", "code": code_name}
        assert registry.get_sample_value("grpc_server_handled_total", labels) == 1
    assert registry.get_sample_value("grpc_server_running") == 0


@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream"])
async def test_bytes_that_are_no_message_are_bad_input(served: Any, kind: str) -> None:
    channel, _, _ = served
    coders: Any = {"request_serializer": bytes, "response_deserializer": Response.FromString}
    for data in (b"\x0a\x02\xff\xfe", b"\xff\xff", b"\x0a\x05x"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if kind == "UnaryUnary":
                await channel.unary_unary("/test/UnaryUnary", **coders)(data)
            else:
                async for _ in channel.unary_stream("/test/UnaryStream", **coders)(data):
                    pass
        assert (caught.value.code(), reason_of(caught.value)) == (
            grpc.StatusCode.INVALID_ARGUMENT, InvalidField.reason
        )


async def test_a_client_that_leaves_ends_the_servicers_generator(served: Any) -> None:
    channel, handlers, _ = served
    coders: Any = {"request_serializer": Request.SerializeToString, "response_deserializer": Response.FromString}
    stream = channel.unary_stream("/test/UnaryStream", **coders)(Request(user_id="endless"))
    await stream.read()
    stream.cancel()
    async with asyncio.timeout(5):
        while not handlers.ended:
            await asyncio.sleep(0.01)
