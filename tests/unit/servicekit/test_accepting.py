"""Busy methods are taken up by many acceptors, and stop as the rest does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from servicekit.rpc.accepting import ACCEPTORS, AcceptingServer

METHOD = "/test.Service/Wait"


class Gate:
    """Calls wait in it until it opens."""

    def __init__(self) -> None:
        self.waiting = 0
        self.opened = asyncio.Event()

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.waiting += 1
        await self.opened.wait()
        return request


async def serve(gate: Gate) -> tuple[AcceptingServer, int]:
    """A server whose one method is the gate's, and its port."""
    core = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(gate.wait)
    core.add_registered_method_handlers("test.Service", {"Wait": handler})
    port = core.add_insecure_port("127.0.0.1:0")
    server = AcceptingServer(core, {METHOD: handler})
    await server.start()
    return server, port


@pytest.fixture
async def gate() -> Gate:
    return Gate()


@pytest.fixture
async def served(gate: Gate) -> AsyncIterator[tuple[AcceptingServer, Any]]:
    server, port = await serve(gate)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, channel.unary_unary(METHOD)
    await server.stop(None)


async def until(done: Any) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.01)


async def test_calls_are_taken_up_by_acceptors_and_answered(gate: Gate, served: tuple[AcceptingServer, Any]) -> None:
    server, call = served
    calls = [asyncio.create_task(_answer(call, b"%d" % number)) for number in range(3 * ACCEPTORS)]
    await until(lambda: gate.waiting == len(calls))
    assert len(server._calls) >= len(calls) - 3, "grpc.aio took up the calls by itself: does it have new names?"
    gate.opened.set()
    assert await asyncio.gather(*calls) == [b"%d" % number for number in range(len(calls))]
    await until(lambda: not server._calls)


async def test_a_stop_lets_running_calls_end_and_takes_no_more(gate: Gate, served: tuple[AcceptingServer, Any]) -> None:
    server, call = served
    running = asyncio.create_task(_answer(call, b"x"))
    await until(lambda: gate.waiting == 1)
    stopping = asyncio.create_task(server.stop(20))
    await asyncio.sleep(0.1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(b"late", timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    gate.opened.set()
    assert await running == b"x"
    async with asyncio.timeout(10):
        await stopping
    assert all(each.done() for each in server._acceptors)


async def test_a_version_without_the_names_serves_all_the_same(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servicekit.rpc.accepting._NEEDED", ("nothing_of_that_name",))
    server, port = await serve(gate)
    gate.opened.set()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary(METHOD)(b"x") == b"x"
    assert server._acceptors == []
    await server.stop(None)


async def _answer(call: Any, request: bytes) -> bytes:
    answer: bytes = await call(request, timeout=20)
    return answer
