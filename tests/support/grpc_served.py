"""Our gRPC server with handlers that take and give bytes, for tests that look at it from outside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from servicekit.rpc.grpc_server import GrpcServer, listen

LARGE = bytes(range(256)) * 1200
"""300 KB: more than any frame, and more than a window of 64 KiB."""


class Handlers:
    """Bytes in, bytes out; it is told how handlers ended."""

    def __init__(self) -> None:
        self.running = 0
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.seen: list[Any] = []

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.seen.append((context.invocation_metadata(), context.time_remaining()))
        return request

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.running += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return request

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """As many messages as the request says, each of the size it says: `10,1000`."""
        self.running += 1
        number, size = map(int, request.decode().split(","))
        try:
            for index in range(number):
                yield str(index).encode().ljust(size, b".")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def joined(self, requests: Any, context: Any) -> bytes:
        return b"+".join([each async for each in requests])

    async def each(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()

    async def abort(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, request.decode(), (("x-text", "a"), ("x-raw-bin", b"\x00\xff")))

    async def fail(self, request: bytes, context: Any) -> bytes:
        raise RuntimeError("a secret")


def served_methods(handlers: Handlers) -> dict[str, Any]:
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    coders: Any = {"request_deserializer": bytes, "response_serializer": bytes}
    return {
        "Echo": unary(handlers.echo, **coders), "Wait": unary(handlers.wait, **coders), "Abort": unary(handlers.abort, **coders),
        "Fail": unary(handlers.fail, **coders), "Count": stream(handlers.count, **coders),
        "Joined": grpc.stream_unary_rpc_method_handler(handlers.joined, **coders),
        "Each": grpc.stream_stream_rpc_method_handler(handlers.each, **coders),
    }


class Served:
    """A server, its handlers, and ways to call it."""

    def __init__(self) -> None:
        self.sockets = listen("127.0.0.1:0")
        self.port: int = self.sockets[0].getsockname()[1]
        self.handlers = Handlers()
        self.server = GrpcServer(self.sockets)
        self.server.add_registered_method_handlers("test", served_methods(self.handlers))

    @contextlib.asynccontextmanager
    async def channel(self, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
        more = [("grpc.use_local_subchannel_pool", 1), *options.items()]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=more) as channel:
            yield channel

    async def at_rest(self) -> bool:
        async with asyncio.timeout(10):
            while self.server.tasks or any(each.streams for each in self.server.connections.values()):
                await asyncio.sleep(0.005)
        return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
