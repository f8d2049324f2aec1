"""Calls between our services: our channel and gRPC's keep the same promises, before our server and before gRPC's."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import hpack
import pytest

from servicekit.http2 import frames, headers
from servicekit.http2.frames import ErrorCode, Flag, Kind, Setting
from servicekit.rpc import grpc_client
from servicekit.rpc.channel import OPTIONS
from servicekit.rpc.grpc_client import UnaryChannel, client_tls
from servicekit.rpc.grpc_server import GrpcServer, listen, tls_context
from tests.support.certificates import Certificates
from tests.support.http2_peer import message
from tests.support.ports import free_port

CODERS: Any = {"request_deserializer": bytes, "response_serializer": bytes}
Code = grpc.StatusCode


class Handlers:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.waiting = 0
        self.cancelled = 0
        self.metadata: dict[str, Any] = {}
        self.remaining: float | None = None

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.metadata = dict(context.invocation_metadata())
        self.remaining = context.time_remaining()
        return request

    async def grow(self, request: bytes, context: Any) -> bytes:
        return b"x" * int(request)

    async def abort(self, request: bytes, context: Any) -> bytes:
        await context.abort(Code.NOT_FOUND, request.decode(), (("x-text", "a"), ("x-raw-bin", b"\x00\xff")))

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return request

    @property
    def methods(self) -> dict[str, Any]:
        unary: Any = grpc.unary_unary_rpc_method_handler
        return {
            "Echo": unary(self.echo, **CODERS), "Abort": unary(self.abort, **CODERS), "Wait": unary(self.wait, **CODERS),
            "Grow": unary(self.grow, **CODERS),
        }


async def serve(kind: str, handlers: Handlers, port: int) -> Callable[[], Awaitable[Any]]:
    """Starts a server; answers how to stop it."""
    if kind == "ours":
        server = GrpcServer(listen(f"127.0.0.1:{port}"))
        server.add_registered_method_handlers("test", handlers.methods)
        await server.start()
        return lambda: server.stop(0)
    theirs = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    theirs.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers.methods),))
    theirs.add_insecure_port(f"127.0.0.1:{port}")
    await theirs.start()
    return lambda: theirs.stop(0)


def channel_to(kind: str, port: int) -> grpc.aio.Channel:
    if kind == "ours":
        return UnaryChannel(f"127.0.0.1:{port}")
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)


@pytest.fixture(params=["ours-ours", "ours-gRPC's", "gRPC's-ours"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[grpc.aio.Channel, Handlers]]:
    """A channel and the handlers it leads to."""
    mine, theirs = request.param.split("-")
    handlers, port = Handlers(), free_port()
    stop = await serve(theirs, handlers, port)
    async with channel_to(mine, port) as channel:
        yield channel, handlers
    handlers.gate.set()
    await stop()


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 20)
    return caught.value


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_531, 65_536, 2**20, 5 * 2**20])
async def test_messages_of_any_size_go_and_come(pair: Any, size: int) -> None:
    channel, _ = pair
    assert await channel.unary_unary("/test/Grow")(str(size).encode(), timeout=20) == b"x" * size
    if size < 4 * 2**20:
        assert await channel.unary_unary("/test/Echo")(b"y" * size, timeout=20) == b"y" * size


async def test_metadata_and_deadline_arrive(pair: Any) -> None:
    channel, handlers = pair
    await channel.unary_unary("/test/Echo")(b"", timeout=20, metadata=(("authorization", "Bearer t"), ("x-raw-bin", b"\0\xff")))
    assert (handlers.metadata["authorization"], handlers.metadata["x-raw-bin"]) == ("Bearer t", b"\0\xff")
    assert 15 < (handlers.remaining or 0) < 21
    await channel.unary_unary("/test/Echo")(b"")
    assert handlers.remaining is None


async def test_an_error_tells_code_text_and_trailers(pair: Any) -> None:
    channel, _ = pair
    error = await refused(channel.unary_unary("/test/Abort")("100 %\n\u00e9".encode()))
    assert (error.code(), error.details()) == (Code.NOT_FOUND, "100 %\n\u00e9")
    assert {name: value for name, value in error.trailing_metadata() or () if name.startswith("x-")} == {
        "x-text": "a", "x-raw-bin": b"\x00\xff",
    }
    assert (await refused(channel.unary_unary("/test/Other")(b""))).code() is Code.UNIMPLEMENTED


async def test_a_deadline_ends_both_sides(pair: Any) -> None:
    channel, handlers = pair
    assert (await refused(channel.unary_unary("/test/Wait")(b"", timeout=0.1))).code() is Code.DEADLINE_EXCEEDED
    await until(lambda: handlers.cancelled == 1)


async def test_a_caller_that_leaves_ends_the_call(pair: Any) -> None:
    channel, handlers = pair
    tasks = [asyncio.ensure_future(_wait(channel)) for _ in range(10)]
    await until(lambda: handlers.waiting == 10)
    for task in tasks[:5]:
        task.cancel()
    await until(lambda: handlers.cancelled == 5)
    handlers.gate.set()
    assert await asyncio.gather(*tasks[5:]) == [b"w"] * 5


async def _wait(channel: grpc.aio.Channel) -> bytes:
    answer: bytes = await channel.unary_unary("/test/Wait")(b"w")
    return answer


async def test_many_calls_at_once(pair: Any) -> None:
    channel, _ = pair
    echo = channel.unary_unary("/test/Echo")
    wanted = [str(number).encode() * 50 for number in range(500)]
    assert await asyncio.gather(*(echo(each, timeout=20) for each in wanted)) == wanted


@pytest.mark.parametrize("kind", ["ours", "gRPC's"])
@pytest.mark.parametrize("theirs", ["ours", "gRPC's"])
async def test_a_server_that_goes_and_comes_back(kind: str, theirs: str) -> None:
    handlers, port = Handlers(), free_port()
    async with channel_to(kind, port) as channel:
        echo = channel.unary_unary("/test/Echo")
        assert (await refused(echo(b"", timeout=5))).code() is Code.UNAVAILABLE
        for _ in range(2):
            stop = await serve(theirs, handlers, port)
            await asyncio.wait_for(channel.channel_ready(), 10)
            assert channel.get_state() is grpc.ChannelConnectivity.READY
            assert await echo(b"hi", timeout=5) == b"hi"
            waiting = asyncio.ensure_future(_wait(channel))
            await until(lambda: handlers.waiting)
            handlers.waiting = 0
            await stop()
            assert (await refused(waiting)).code() in (Code.UNAVAILABLE, Code.CANCELLED)
            assert (await refused(echo(b"", timeout=5))).code() is Code.UNAVAILABLE
            assert channel.get_state() is not grpc.ChannelConnectivity.READY


async def test_while_a_server_is_known_to_be_away_calls_fail_at_once() -> None:
    async with UnaryChannel(f"127.0.0.1:{free_port()}") as channel:
        echo = channel.unary_unary("/test/Echo")
        assert "refused" in str((await refused(echo(b"", timeout=5))).details()).lower()
        assert channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE
        for _ in range(100):
            assert (await refused(echo(b"", timeout=5))).code() is Code.UNAVAILABLE


async def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    handlers, sockets = Handlers(), listen("127.0.0.1:0")
    server = GrpcServer(sockets, tls=tls_context(made.cert, made.key, made.ca))
    server.add_registered_method_handlers("test", handlers.methods)
    await server.start()
    target = f"127.0.0.1:{sockets[0].getsockname()[1]}"
    async with UnaryChannel(target, tls=client_tls(made.ca, made.cert, made.key)) as channel:
        assert await channel.unary_unary("/test/Echo")(b"hi" * 50_000, timeout=10) == b"hi" * 50_000
    async with UnaryChannel(target, tls=client_tls(made.ca)) as channel:
        assert (await refused(channel.unary_unary("/test/Echo")(b"", timeout=2))).code() in (
            Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED,
        )
    async with UnaryChannel(target) as channel:
        assert (await refused(channel.unary_unary("/test/Echo")(b"", timeout=2))).code() is Code.UNAVAILABLE
    await server.stop(0)


# Servers that misbehave: what they say is written by hand

OK_HEAD = headers.encode_status(200) + headers.encode([(b"content-type", b"application/grpc")])


def head(stream_id: int, *, ends: bool = False, block: bytes = OK_HEAD) -> bytes:
    return frames.headers_frames(stream_id, block, end_stream=ends)


def data(stream_id: int, content: bytes, *, ends: bool = False) -> bytes:
    return frames.frame(Kind.DATA, Flag.END_STREAM if ends else 0, stream_id, content)


def status(stream_id: int, code: bytes = b"0") -> bytes:
    return frames.headers_frames(stream_id, headers.encode([(b"grpc-status", code)]), end_stream=True)


def answer(stream_id: int, content: bytes = b"yes") -> bytes:
    return head(stream_id) + data(stream_id, message(content)) + status(stream_id)


class Scripted:
    """Says `script(number, stream_id)` when a request has arrived, the `number`th of all connections. The bytes go out
    in pieces of `piece` bytes."""

    def __init__(self, script: Callable[[int, int], bytes], *, settings: dict[Setting, int] | None = None, piece: int = 2**20) -> None:
        self.script = script
        self.settings = settings or {}
        self.piece = piece
        self.requests = 0
        self.connections = 0
        self.resets: list[int] = []
        self.running = 0
        self.most_running = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        decoder = hpack.Decoder()
        assert await reader.readexactly(len(frames.PREFACE)) == frames.PREFACE
        writer.write(frames.settings_frame(self.settings))
        while True:
            upper, lower, kind, flags, stream_id = frames.HEADER.unpack(await reader.readexactly(9))
            payload = await reader.readexactly(upper << 8 | lower)
            if kind == Kind.HEADERS:
                assert dict(decoder.decode(payload))[":method"] == "POST"
                self.running += 1
                self.most_running = max(self.most_running, self.running)
            elif kind == Kind.RST_STREAM:
                self.resets.append(stream_id)
            elif kind == Kind.DATA and flags & Flag.END_STREAM:
                self.requests += 1
                said = self.script(self.requests, stream_id)
                self.running -= 1
                for start in range(0, len(said), self.piece):
                    writer.write(said[start : start + self.piece])
                    await writer.drain()


@contextlib.asynccontextmanager
async def raw_server(handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """Where a server listens; at the end every connection is closed."""
    writers: list[asyncio.StreamWriter] = []

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await handle(reader, writer)
        writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def asked(scripted: Scripted) -> AsyncIterator[Any]:
    """The method of a channel to that server."""
    async with raw_server(scripted.handle) as target, UnaryChannel(target) as channel:
        yield channel.unary_unary("/test/Echo")


async def test_an_answer_is_the_same_wherever_it_is_cut() -> None:
    for piece in range(1, 90):
        async with asked(Scripted(lambda _, stream_id: answer(stream_id), piece=piece)) as echo:
            assert await echo(b"hi", timeout=10) == b"yes", piece


BAD_ANSWERS: dict[str, tuple[Callable[[int], bytes], grpc.StatusCode]] = {
    "no_message": (lambda n: head(n) + status(n), Code.INTERNAL),
    "two_messages": (lambda n: head(n) + data(n, message(b"a") * 2) + status(n), Code.INTERNAL),
    "a_cut_message": (lambda n: head(n) + data(n, message(b"abc")[:-1]) + status(n), Code.INTERNAL),
    "a_compressed_message": (lambda n: head(n) + data(n, message(b"abc", compressed=1)) + status(n), Code.INTERNAL),
    "no_status": (lambda n: head(n) + data(n, message(b"abc"), ends=True), Code.INTERNAL),
    "no_number_as_status": (lambda n: head(n) + status(n, b"fine"), Code.INTERNAL),
    "a_status_to_come": (lambda n: head(n) + status(n, b"99"), Code.UNKNOWN),
    "unavailable_by_a_proxy": (lambda n: head(n, ends=True, block=b"\x08\x03503"), Code.UNAVAILABLE),
    "no_grpc": (lambda n: head(n, block=headers.encode_status(200) + headers.encode([(b"content-type", b"text/html")])), Code.UNKNOWN),
    "reset": (lambda n: head(n) + frames.reset_frame(n, ErrorCode.INTERNAL_ERROR), Code.INTERNAL),
    "cancelled": (lambda n: head(n) + frames.reset_frame(n, ErrorCode.CANCEL), Code.CANCELLED),
    "reset_by_a_code_to_come": (lambda n: frames.frame(Kind.RST_STREAM, 0, n, struct.pack(">I", 77)), Code.INTERNAL),
    "nonsense": (lambda n: b"\xff" * 100, Code.UNAVAILABLE),
    "an_answer_of_nobody": (lambda n: head(n + 2), Code.UNAVAILABLE),
    "a_push": (lambda n: frames.frame(Kind.PUSH_PROMISE, Flag.END_HEADERS, n, bytes(4)), Code.UNAVAILABLE),
}


@pytest.mark.parametrize("which", BAD_ANSWERS)
async def test_an_answer_that_can_not_be_read_is_an_error_and_the_next_call_is_served(which: str) -> None:
    said, code = BAD_ANSWERS[which]
    scripted = Scripted(lambda number, stream_id: said(stream_id) if number == 1 else answer(stream_id))
    async with asked(scripted) as echo:
        assert (await refused(echo(b"hi", timeout=5))).code() is code
        assert await echo(b"hi", timeout=5) == b"yes"
    assert scripted.requests == 2


async def test_an_answer_too_large_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_client, "MOST_ANSWER_BYTES", 1000)
    scripted = Scripted(lambda _, n: head(n) + data(n, struct.pack(">BI", 0, 5000)) + data(n, bytes(5000)))
    async with asked(scripted) as echo:
        assert (await refused(echo(b"hi", timeout=5))).code() is Code.RESOURCE_EXHAUSTED
        await until(lambda: scripted.resets == [1])


@pytest.mark.parametrize("how", ["refused", "goodbye"])
async def test_a_call_that_the_server_did_not_touch_is_sent_again(how: str) -> None:
    def script(number: int, stream_id: int) -> bytes:
        if number > 1:
            return answer(stream_id)
        if how == "refused":
            return frames.reset_frame(stream_id, ErrorCode.REFUSED_STREAM)
        return frames.goaway_frame(0, ErrorCode.NO_ERROR)

    scripted = Scripted(script)
    async with asked(scripted) as echo:
        assert await echo(b"hi", timeout=5) == b"yes"
    assert (scripted.requests, scripted.connections) == (2, 1 if how == "refused" else 2)


async def test_a_call_that_is_never_taken_ends() -> None:
    scripted = Scripted(lambda _, stream_id: frames.reset_frame(stream_id, ErrorCode.REFUSED_STREAM))
    async with asked(scripted) as echo:
        assert (await refused(echo(b"hi", timeout=5))).code() is Code.UNAVAILABLE
    assert scripted.requests == grpc_client.MOST_TRIES


async def test_a_call_whose_connection_breaks_is_not_sent_again() -> None:
    scripted = Scripted(lambda _, stream_id: head(stream_id) + frames.goaway_frame(stream_id, ErrorCode.NO_ERROR) + b"\xff" * 20)
    async with asked(scripted) as echo:
        assert (await refused(echo(b"hi", timeout=5))).code() is Code.UNAVAILABLE
    assert scripted.requests == 1


async def test_a_running_call_outlives_a_goodbye() -> None:
    scripted = Scripted(lambda _, stream_id: frames.goaway_frame(stream_id, ErrorCode.NO_ERROR) + answer(stream_id))
    async with asked(scripted) as echo:
        assert await echo(b"hi", timeout=5) == b"yes"
        assert await echo(b"hi", timeout=5) == b"yes"
    assert scripted.connections == 2


async def test_no_more_calls_at_once_than_the_server_takes() -> None:
    scripted = Scripted(lambda _, stream_id: answer(stream_id), settings={Setting.MAX_CONCURRENT_STREAMS: 3})
    async with asked(scripted) as echo:
        assert await asyncio.gather(*(echo(b"hi", timeout=10) for _ in range(50))) == [b"yes"] * 50
    assert scripted.most_running <= 3
    assert scripted.connections == 1


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH-2.0-x\r\n"])
async def test_a_server_of_another_protocol_is_no_connection(greeting: bytes) -> None:
    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)

    async with raw_server(handle) as target, UnaryChannel(target) as channel:
        assert (await refused(channel.unary_unary("/test/Echo")(b"", timeout=5))).code() is Code.UNAVAILABLE
        assert channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE


async def test_a_server_that_says_nothing_keeps_nobody_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handle(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(handle) as target:
        async with UnaryChannel(target) as channel:
            echo = channel.unary_unary("/test/Echo")
            assert (await refused(echo(b"", timeout=0.1))).code() is Code.DEADLINE_EXCEEDED
        monkeypatch.setattr(grpc_client, "CONNECT_SECONDS", 0.1)
        async with UnaryChannel(target) as channel:
            error = await refused(channel.unary_unary("/test/Echo")(b"", timeout=5))
            assert (error.code(), "does not answer" in str(error.details())) == (Code.UNAVAILABLE, True)


async def test_a_name_that_is_not_known_is_told() -> None:
    async with UnaryChannel("nowhere.invalid:1") as channel:
        assert "name" in str((await refused(channel.unary_unary("/test/Echo")(b"", timeout=20))).details())


async def test_a_closed_channel_takes_no_calls() -> None:
    channel = UnaryChannel(f"dns:///127.0.0.1:{free_port()}")
    await channel.close()
    assert (await refused(channel.unary_unary("/test/Echo")(b"", timeout=5))).code() is Code.UNAVAILABLE
    assert channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.SHUTDOWN


def test_streams_are_not_for_this_channel() -> None:
    channel = UnaryChannel("127.0.0.1:1")
    for method in (channel.unary_stream, channel.stream_unary, channel.stream_stream):
        with pytest.raises(TypeError, match="/test/Each is a stream"):
            method("/test/Each")(b"")
