"""grpc.health.v1 behind the interceptor: checks, watches, and what a drain does to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from servicekit.core.clock import SystemClock
from servicekit.core.ids import RandomIdSource
from servicekit.lifecycle import Readiness
from servicekit.rpc.auth import NoAuthentication
from servicekit.rpc.grpc_server import GrpcServer, listen
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.server import HealthBoard, kit_scopes
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry.metrics import RpcMetrics

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Request = health_pb2.HealthCheckRequest


@pytest.fixture
async def served() -> AsyncIterator[tuple[Any, HealthBoard, GrpcServer]]:
    """A stub, the board and the server."""
    board, sockets = HealthBoard(["a"]), listen("127.0.0.1:0")
    server = GrpcServer(sockets)
    interceptor = CallInterceptor(
        authenticator=NoAuthentication(), scopes=kit_scopes(reflection_open=True), validator=RequestValidator(),
        metrics=RpcMetrics(CollectorRegistry()), clock=SystemClock(), ids=RandomIdSource(),
    )
    health_pb2_grpc.add_HealthServicer_to_server(board.servicer, interceptor.guard(server))  # type: ignore[no-untyped-call]
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{sockets[0].getsockname()[1]}") as channel:
        yield health_pb2_grpc.HealthStub(channel), board, server
    await server.stop(0)


async def test_a_check_tells_what_the_board_shows(served: Any) -> None:
    stub, board, _ = served
    for serving, status in ((False, NOT_SERVING), (True, SERVING)):
        await board.show(serving=serving)
        for name in ("", "a"):
            assert (await stub.Check(Request(service=name))).status == status
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(Request(service="b"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_server_serves_when_its_checks_have_passed_and_not_before(served: Any) -> None:
    stub, board, _ = served
    ready = False

    async def check() -> bool:
        return ready

    readiness = Readiness(board, {"database": check})
    await readiness.begin()
    for _ in range(2):
        assert (await stub.Check(Request())).status == NOT_SERVING
        await readiness.refresh()
    ready = True
    await readiness.refresh()
    assert (await stub.Check(Request())).status == SERVING


async def test_a_watch_is_told_every_change_until_its_client_leaves(served: Any) -> None:
    stub, board, server = served
    await board.show(serving=False)
    watch = stub.Watch(Request(service="a"))
    assert (await watch.read()).status == NOT_SERVING
    await board.show(serving=True)
    assert (await watch.read()).status == SERVING
    watch.cancel()
    async with asyncio.timeout(5):
        while server.tasks:
            await asyncio.sleep(0.005)


async def test_a_drain_ends_watches_and_waits_for_none(served: Any) -> None:
    stub, board, server = served
    await board.show(serving=True)
    watches = [stub.Watch(Request(service=name)) for name in ("", "a", "unknown")]
    for watch in watches:
        await watch.read()
    await board.drain()
    await asyncio.wait_for(server.stop(60), 5)
    for watch in watches:
        told = set()
        while (answer := await watch.read()) is not grpc.aio.EOF:
            told.add(answer.status)
        assert told == {NOT_SERVING}
        assert await watch.code() is grpc.StatusCode.OK
