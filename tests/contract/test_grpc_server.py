"""Our gRPC server before clients that behave, that misbehave, that are slow and that vanish; on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from servicekit.http2 import connection, frames, server
from servicekit.http2.frames import ErrorCode, Flag, Kind, Setting
from servicekit.rpc import grpc_call
from servicekit.rpc.grpc_server import GrpcServer, listen, tls_context
from tests.support.certificates import Certificates
from tests.support.http2_peer import Frame, Peer, message

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


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    made = Served()
    await made.server.start()
    yield made
    made.handlers.gate.set()
    await made.server.stop(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# Clients that behave


async def test_all_four_kinds_of_call_are_answered(served: Served) -> None:
    async with served.channel() as channel:
        assert await channel.unary_unary("/test/Echo")(b"hi") == b"hi"
        assert await channel.unary_unary("/test/Echo")(b"") == b""
        assert [each async for each in channel.unary_stream("/test/Count")(b"3,1")] == [b"0", b"1", b"2"]
        assert [each async for each in channel.unary_stream("/test/Count")(b"0,1")] == []
        assert await channel.stream_unary("/test/Joined")(iter([b"a", b"", b"b"])) == b"a++b"
        assert await channel.stream_unary("/test/Joined")(iter([])) == b""
        assert [each async for each in channel.stream_stream("/test/Each")(iter([b"a", b"b"]))] == [b"A", b"B"]
    assert await served.at_rest()
    assert (served.server.calls_begun, served.server.calls_succeeded, served.server.calls_failed) == (7, 7, 0)


async def test_a_conversation_of_streams_goes_back_and_forth(served: Served) -> None:
    async with served.channel() as channel:
        call = channel.stream_stream("/test/Each")()
        for text in (b"a", b"b" * 100_000, b"c"):
            await call.write(text)
            assert await call.read() == text.upper()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("size", [1, 16_379, 16_380, 65_531, 2**20, 2**20 + 1, 8 * 2**20])
async def test_messages_of_any_size_come_back(served: Served, size: int) -> None:
    async with served.channel(**{"grpc.max_receive_message_length": -1}) as channel:
        assert await channel.unary_unary("/test/Echo")(b"x" * size) == b"x" * size
        (one,) = [each async for each in channel.unary_stream("/test/Count")(f"1,{size}".encode())]
        assert len(one) == size
        assert await channel.stream_unary("/test/Joined")(iter([b"y" * size] * 2)) == b"y" * size + b"+" + b"y" * size


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_read(served: Served, compression: grpc.Compression) -> None:
    async with served.channel() as channel:
        assert await channel.unary_unary("/test/Echo")(LARGE, compression=compression) == LARGE


async def test_messages_larger_than_the_limit_are_refused_in_both_directions(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_call, "MOST_MESSAGE_BYTES", 1000)
    async with served.channel() as channel:
        for call in (
            channel.unary_unary("/test/Echo")(b"x" * 1001), channel.stream_unary("/test/Joined")(iter([b"x" * 600] * 2)),
            channel.unary_unary("/test/Echo")(b"x" * 100_000, compression=grpc.Compression.Gzip),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1000 bytes" in str(caught.value.details())
        assert await channel.unary_unary("/test/Echo")(b"x" * 1000) == b"x" * 1000


async def test_metadata_and_the_deadline_reach_the_handler(served: Served) -> None:
    async with served.channel() as channel:
        metadata = (("x-own", "a b"), ("x-raw-bin", b"\x00\xfe"), ("x-raw-bin", b""))
        await channel.unary_unary("/test/Echo")(b"", metadata=metadata, timeout=20)
        await channel.unary_unary("/test/Echo")(b"")
    (first, remaining), (_, none) = served.handlers.seen
    assert [each for each in first if each[0].startswith("x-")] == [("x-own", "a b"), ("x-raw-bin", b"\x00\xfe"), ("x-raw-bin", b"")]
    assert not any(name in ("te", "content-type", "grpc-timeout") for name, _ in first)
    assert 15 < remaining < 21  # clients round up
    assert none is None


async def test_an_abort_tells_code_text_and_trailers(served: Served) -> None:
    async with served.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test/Abort")("not here: 100 %\n\u00e9\u4e2d".encode())
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "not here: 100 %\n\u00e9\u4e2d")
    assert dict(error.trailing_metadata() or ()) == {"x-text": "a", "x-raw-bin": b"\x00\xff"}


async def test_a_failed_handler_is_unknown_and_tells_nothing(served: Served) -> None:
    async with served.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test/Fail")(b"")
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in str(caught.value.details())


async def test_a_method_that_is_not_there_is_unimplemented(served: Served) -> None:
    async with served.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test/Other")(b"x")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with Peer(served.port) as peer:  # grpc.aio's client tells INTERNAL when it was about to write
        peer.send(peer.headers(1, "/other/Each"), peer.data(1, message(b"x"), ends=False))
        _, fields = await peer.answer(1)
        assert fields["grpc-status"] == str(grpc.StatusCode.UNIMPLEMENTED.value[0])
        reset = await peer.until(Kind.RST_STREAM)  # what is still to come nobody reads
        assert reset is not None
        assert (reset.stream_id, reset.code) == (1, ErrorCode.NO_ERROR)


async def test_a_deadline_cancels_the_handler_and_is_told(served: Served) -> None:
    async with Peer(served.port) as peer:
        peer.send(peer.request(1, path="/test/Wait", grpc_timeout="50m"))
        _, fields = await peer.answer(1)
        assert fields["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    await until(lambda: served.handlers.cancelled == 1)


async def test_a_client_that_cancels_cancels_the_handler(served: Served) -> None:
    async with served.channel() as channel:
        calls = [channel.unary_unary("/test/Wait")(b"") for _ in range(20)]
        await until(lambda: served.handlers.running == 20)
        for call in calls[:15]:
            call.cancel()
        await until(lambda: served.handlers.cancelled == 15)
        served.handlers.gate.set()
        assert [await call for call in calls[15:]] == [b""] * 5
    assert await served.at_rest()


async def test_a_connection_that_is_lost_cancels_its_handlers(served: Served) -> None:
    async with Peer(served.port) as peer:
        peer.send(peer.request(1, path="/test/Wait"), peer.request(3, path="/test/Wait"))
        await until(lambda: served.handlers.running == 2)
        peer.writer.transport.abort()
        await until(lambda: served.handlers.cancelled == 2)
    assert await served.at_rest()
    assert not served.server.connections


async def test_a_thousand_calls_at_once_on_one_connection(served: Served) -> None:
    async with served.channel() as channel:
        echo = channel.unary_unary("/test/Echo")
        wanted = [str(number).encode() for number in range(1000)]
        assert await asyncio.gather(*(echo(each) for each in wanted)) == wanted


# The server's end


async def test_a_stop_lets_running_calls_end_and_takes_no_more(served: Served) -> None:
    async with served.channel() as channel:
        running = channel.unary_unary("/test/Wait")(b"mine")
        await until(lambda: served.handlers.running == 1)
        stopping = asyncio.create_task(served.server.stop(10))
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test/Echo")(b"late", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        served.handlers.gate.set()
        assert await running == b"mine"
        await asyncio.wait_for(stopping, 5)
    assert not served.server.connections


async def test_what_outlasts_the_grace_is_cancelled_and_told(served: Served) -> None:
    async with served.channel() as channel:
        running = channel.unary_unary("/test/Wait")(b"mine")
        await until(lambda: served.handlers.running == 1)
        await asyncio.wait_for(served.server.stop(0.05), 5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert served.handlers.cancelled == 1


async def test_a_request_behind_the_goodbye_is_left_for_another_connection(served: Served) -> None:
    async with Peer(served.port) as peer:
        peer.send(peer.request(1, path="/test/Wait"))
        await until(lambda: served.handlers.running == 1)
        next(iter(served.server.connections.values())).go_away()
        goodbye = await peer.until(Kind.GOAWAY)
        assert goodbye is not None
        assert (goodbye.code, goodbye.payload[:4]) == (ErrorCode.NO_ERROR, b"\0\0\0\x01")
        peer.send(peer.request(3))
        served.handlers.gate.set()
        body, _ = await peer.answer(1)
        assert body == message(b"hi")
        assert await peer.is_closed()
    assert served.server.calls_begun == 1


# Bytes as the network cuts them


async def test_a_request_that_arrives_in_two_parts_is_the_same_wherever_it_is_cut(served: Served) -> None:
    async with Peer(served.port, greet=False) as peer:
        whole = frames.PREFACE + frames.settings_frame({}) + peer.request(1, b"hello")
    for cut in range(1, len(whole)):
        async with Peer(served.port, greet=False) as peer:
            peer.send(whole[:cut])
            await peer.writer.drain()
            await asyncio.sleep(0)
            peer.send(whole[cut:])
            body, fields = await peer.answer(1)
            assert (body, fields["grpc-status"]) == (message(b"hello"), "0"), cut


async def test_a_request_byte_by_byte_padded_continued_with_trailers(served: Served) -> None:
    async with Peer(served.port) as peer:
        block = peer.block(x_own="1" * 300)
        padded = bytes((3,)) + struct.pack(">IB", 0, 9) + block[:10] + bytes(3)
        data = message(b"hello")
        for part in (
            frames.frame(Kind.HEADERS, Flag.PADDED | Flag.PRIORITY, 1, padded),
            frames.frame(Kind.CONTINUATION, 0, 1, block[10:20]), frames.frame(Kind.CONTINUATION, 0, 1),
            frames.frame(Kind.CONTINUATION, Flag.END_HEADERS, 1, block[20:]),
            frames.frame(Kind.DATA, Flag.PADDED, 1, bytes((5,)) + data[:3] + bytes(5)),
            *(frames.frame(Kind.DATA, 0, 1, data[index : index + 1]) for index in range(3, len(data))),
            frames.frame(99, 0, 1, b"of a kind that is not known"),
            frames.headers_frames(1, b"\x00\x01a\x01b", end_stream=True),
        ):
            for index in range(len(part)):
                peer.send(part[index : index + 1])
                await peer.writer.drain()
        body, fields = await peer.answer(1)
        assert (body, fields["grpc-status"]) == (data, "0")


# Slow clients


async def test_an_answer_goes_out_as_the_client_allows(served: Served) -> None:
    async with Peer(served.port, {Setting.INITIAL_WINDOW_SIZE: 0}) as peer:
        peer.send(peer.request(1, b"20,1000", path="/test/Count"), peer.request(3))
        assert (await peer.until(Kind.HEADERS)) is not None
        peer.send(frames.window_update_frame(1, 1))
        found = await peer.until(Kind.DATA)
        assert found is not None
        assert (found.stream_id, len(found.payload)) == (1, 1)
        peer.send(frames.window_update_frame(3, 100))  # one that waits is no obstacle for another
        body, _ = await peer.answer(3)
        assert body == message(b"hi")
        peer.send(frames.settings_frame({Setting.INITIAL_WINDOW_SIZE: 30_000}))
        body, fields = await peer.answer(1)
        assert (len(body), fields["grpc-status"]) == (20 * 1005 - 1, "0")


async def test_a_window_that_became_negative_is_respected(served: Served) -> None:
    async with Peer(served.port, {Setting.INITIAL_WINDOW_SIZE: 1000}) as peer:
        peer.send(peer.request(1, b"3,1000", path="/test/Count"))
        taken = 0
        while taken < 1000:
            found = await peer.until(Kind.DATA)
            assert found is not None
            taken += len(found.payload)
        peer.send(frames.settings_frame({Setting.INITIAL_WINDOW_SIZE: 0}), frames.window_update_frame(1, 1000))
        peer.send(frames.frame(Kind.PING, 0, 0, b"12345678"))
        found = await peer.until(Kind.DATA, Kind.PING)
        assert found is not None
        assert found.kind == Kind.PING  # the window is 0: -1000 and 1000
        peer.send(frames.window_update_frame(1, 2015))
        while taken < 3015:
            found = await peer.until(Kind.DATA)
            assert found is not None
            taken += len(found.payload)


async def test_the_window_of_the_connection_holds_for_all_streams(served: Served) -> None:
    async with Peer(served.port, {Setting.INITIAL_WINDOW_SIZE: 2**20}) as peer:
        peer.send(peer.request(1, LARGE_COUNT, path="/test/Count"), peer.request(3, LARGE_COUNT, path="/test/Count"))
        taken = {1: 0, 3: 0}
        while sum(taken.values()) < 65_535:
            found = await peer.until(Kind.DATA)
            assert found is not None
            taken[found.stream_id] += len(found.payload)
        peer.send(frames.frame(Kind.PING, 0, 0, b"12345678"))
        found = await peer.until(Kind.DATA, Kind.PING)
        assert found is not None
        assert found.kind == Kind.PING
        peer.send(frames.window_update_frame(0, 2**20))
        while sum(taken.values()) < 2 * 100 * 1005:
            found = await peer.until(Kind.DATA)
            assert found is not None
            taken[found.stream_id] += len(found.payload)
        assert taken[1] == taken[3]


LARGE_COUNT = b"100,1000"


async def test_a_client_that_does_not_read_stops_its_handler_and_no_memory_grows(served: Served) -> None:
    async with Peer(served.port, {Setting.INITIAL_WINDOW_SIZE: 2**31 - 1}) as peer:
        peer.send(frames.window_update_frame(0, 2**31 - 1 - 65_535))
        peer.send(peer.request(1, b"1000000,16000", path="/test/Count"))
        await until(lambda: served.handlers.running == 1)
        (one,) = served.server.connections.values()
        await until(lambda: one.is_full)
        await asyncio.sleep(0.2)
        waiting = one._transport.get_write_buffer_size() + one._out_size
        assert waiting < 2 * connection.PENDING_BYTES
        peer.writer.transport.abort()
        await until(lambda: served.handlers.running == 0)


async def test_a_client_that_leaves_in_the_middle_of_a_message_is_forgotten(served: Served) -> None:
    async with Peer(served.port) as peer:
        peer.send(peer.request(1, b"1,300000", path="/test/Count"))
        assert (await peer.until(Kind.DATA)) is not None
        peer.send(frames.reset_frame(1, ErrorCode.CANCEL))
        assert await served.at_rest()
        peer.send(peer.request(3))
        peer.send(frames.window_update_frame(0, 2**20))
        body, _ = await peer.answer(3)
        assert body == message(b"hi")


async def test_a_deadline_in_the_middle_of_a_message_resets_the_stream(served: Served) -> None:
    async with Peer(served.port) as peer:
        peer.send(peer.request(1, b"1,300000", path="/test/Count", grpc_timeout="200m"))
        found = await peer.until(Kind.RST_STREAM)
        assert found is not None
        assert found.code is ErrorCode.CANCEL
    assert await served.at_rest()


# Clients that misbehave


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> Callable[[Peer], bytes]:
    return lambda peer: frames.frame(kind, flags, stream_id, payload)


ENDS_THE_CONNECTION: dict[str, tuple[Callable[[Peer], bytes], ErrorCode]] = {
    "frame_too_large": (_frame(Kind.DATA, 0, 1, bytes(16_385)), ErrorCode.FRAME_SIZE_ERROR),
    "data_of_no_stream": (_frame(Kind.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data_before_headers": (_frame(Kind.DATA, 0, 5, b"x"), ErrorCode.PROTOCOL_ERROR),
    "headers_of_an_even_stream": (lambda peer: peer.headers(2), ErrorCode.PROTOCOL_ERROR),
    "headers_of_no_stream": (lambda peer: peer.headers(0), ErrorCode.PROTOCOL_ERROR),
    "headers_of_an_older_stream": (lambda peer: peer.request(5) + peer.headers(3), ErrorCode.STREAM_CLOSED),
    "headers_that_can_not_be_read": (_frame(Kind.HEADERS, Flag.END_HEADERS, 1, b"\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "too_much_padding": (_frame(Kind.HEADERS, Flag.END_HEADERS | Flag.PADDED, 1, b"\x05ab"), ErrorCode.PROTOCOL_ERROR),
    "padding_of_nothing": (_frame(Kind.HEADERS, Flag.END_HEADERS | Flag.PADDED, 1), ErrorCode.PROTOCOL_ERROR),
    "priority_cut_off": (_frame(Kind.HEADERS, Flag.END_HEADERS | Flag.PRIORITY, 1, b"\0\0"), ErrorCode.FRAME_SIZE_ERROR),
    "data_within_headers": (
        lambda peer: frames.frame(Kind.HEADERS, 0, 1, b"\x82") + frames.frame(Kind.DATA, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR,
    ),
    "continuation_of_another": (
        lambda peer: frames.frame(Kind.HEADERS, 0, 1, b"\x82") + frames.frame(Kind.CONTINUATION, 4, 3, b"\x82"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "continuation_of_nothing": (_frame(Kind.CONTINUATION, Flag.END_HEADERS, 1, b"\x82"), ErrorCode.PROTOCOL_ERROR),
    "priority_of_no_stream": (_frame(Kind.PRIORITY, 0, 0, bytes(5)), ErrorCode.PROTOCOL_ERROR),
    "reset_of_no_stream": (_frame(Kind.RST_STREAM, 0, 0, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "reset_of_a_stream_to_come": (_frame(Kind.RST_STREAM, 0, 9, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "reset_cut_off": (_frame(Kind.RST_STREAM, 0, 1, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "settings_of_a_stream": (_frame(Kind.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "settings_cut_off": (_frame(Kind.SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "acknowledgement_with_content": (_frame(Kind.SETTINGS, Flag.ACK, 0, bytes(6)), ErrorCode.FRAME_SIZE_ERROR),
    "push_promise": (_frame(Kind.PUSH_PROMISE, Flag.END_HEADERS, 1, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "ping_of_a_stream": (_frame(Kind.PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "ping_cut_off": (_frame(Kind.PING, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "goaway_of_a_stream": (_frame(Kind.GOAWAY, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "goaway_cut_off": (_frame(Kind.GOAWAY, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "window_of_a_stream_to_come": (_frame(Kind.WINDOW_UPDATE, 0, 9, b"\0\0\0\1"), ErrorCode.PROTOCOL_ERROR),
    "window_of_nothing": (_frame(Kind.WINDOW_UPDATE, 0, 0, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "window_cut_off": (_frame(Kind.WINDOW_UPDATE, 0, 0, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "window_too_large": (_frame(Kind.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), ErrorCode.FLOW_CONTROL_ERROR),
    "headers_without_end": (
        lambda peer: frames.frame(Kind.HEADERS, 0, 1, b"\x82") + frames.frame(Kind.CONTINUATION, 0, 1) * 40,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "headers_too_large": (
        lambda peer: frames.frame(Kind.HEADERS, 0, 1, b"\x82") + frames.frame(Kind.CONTINUATION, 0, 1, bytes(16_000)) * 5,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "header_list_too_large": (lambda peer: peer.headers(1, x_large="x" * 70_000), ErrorCode.COMPRESSION_ERROR),
    "nothing_again_and_again": (
        lambda peer: peer.headers(1) + frames.frame(Kind.DATA, 0, 1) * 300, ErrorCode.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("breach", ENDS_THE_CONNECTION)
async def test_a_breach_of_the_protocol_ends_the_connection_and_says_why(served: Served, breach: str) -> None:
    said, code = ENDS_THE_CONNECTION[breach]
    async with Peer(served.port) as peer:
        peer.send(said(peer))
        goodbye = await peer.until(Kind.GOAWAY)
        assert goodbye is not None
        assert goodbye.code is code, goodbye
        assert await peer.is_closed()
    assert await served.at_rest()


ENDS_THE_STREAM: dict[str, tuple[Callable[[Peer], bytes], ErrorCode]] = {
    "malformed_headers": (lambda peer: peer.headers(1, Upper="x"), ErrorCode.PROTOCOL_ERROR),
    "headers_twice": (lambda peer: peer.headers(1) * 1 + peer.headers(1), ErrorCode.PROTOCOL_ERROR),
    "window_of_nothing": (lambda peer: peer.headers(1) + frames.window_update_frame(1, 0), ErrorCode.PROTOCOL_ERROR),
    "window_too_large": (
        lambda peer: peer.headers(1) + frames.window_update_frame(1, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "data_after_the_end": (
        lambda peer: peer.request(1, path="/test/Wait") + peer.data(1, b"x"), ErrorCode.STREAM_CLOSED,
    ),
    "content_length_too_small": (
        lambda peer: peer.headers(1, content_length="3") + peer.data(1, message(b"hi")), ErrorCode.PROTOCOL_ERROR,
    ),
    "content_length_too_large": (
        lambda peer: peer.headers(1, content_length="300") + peer.data(1, message(b"hi")), ErrorCode.PROTOCOL_ERROR,
    ),
    "priority_cut_off": (lambda peer: peer.headers(1) + frames.frame(Kind.PRIORITY, 0, 1, bytes(4)), ErrorCode.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("breach", ENDS_THE_STREAM)
async def test_a_breach_within_a_stream_ends_it_alone(served: Served, breach: str) -> None:
    said, code = ENDS_THE_STREAM[breach]
    async with Peer(served.port) as peer:
        peer.send(said(peer))
        reset = await peer.until(Kind.RST_STREAM)
        assert reset is not None
        assert (reset.stream_id, reset.code) == (1, code)
        peer.send(peer.request(3))
        body, _ = await peer.answer(3)
        assert body == message(b"hi")


REFUSED: dict[str, tuple[Callable[[Peer], bytes], grpc.StatusCode]] = {
    "no_message": (lambda peer: peer.headers(1, ends=True), grpc.StatusCode.INTERNAL),
    "two_messages": (lambda peer: peer.headers(1) + peer.data(1, message(b"a") + message(b"b")), grpc.StatusCode.INTERNAL),
    "a_cut_message": (lambda peer: peer.headers(1) + peer.data(1, message(b"abc")[:-1]), grpc.StatusCode.INTERNAL),
    "a_cut_prefix": (lambda peer: peer.headers(1) + peer.data(1, b"\0\0"), grpc.StatusCode.INTERNAL),
    "a_cut_stream": (lambda peer: peer.headers(1, "/test/Joined") + peer.data(1, b"\0\0"), grpc.StatusCode.INTERNAL),
    "a_timeout_that_is_none": (lambda peer: peer.request(1, grpc_timeout="soon"), grpc.StatusCode.INTERNAL),
    "an_unknown_encoding": (lambda peer: peer.request(1, grpc_encoding="zstd"), grpc.StatusCode.UNIMPLEMENTED),
    "compressed_but_not_told_how": (
        lambda peer: peer.headers(1) + peer.data(1, message(gzip.compress(b"x"), compressed=1)), grpc.StatusCode.INTERNAL,
    ),
    "compressed_nonsense": (
        lambda peer: peer.headers(1, grpc_encoding="gzip") + peer.data(1, message(b"nonsense", compressed=1)),
        grpc.StatusCode.INTERNAL,
    ),
    "compressed_and_cut": (
        lambda peer: peer.headers(1, grpc_encoding="gzip") + peer.data(1, message(gzip.compress(b"x")[:-9], compressed=1)),
        grpc.StatusCode.INTERNAL,
    ),
    "a_compressed_bomb": (
        lambda peer: peer.headers(1, grpc_encoding="gzip")
        + b"".join(peer.data(1, part, ends=False) for part in _parts(message(gzip.compress(bytes(33 * 2**20)), compressed=1))),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    "longer_than_any_message": (
        lambda peer: peer.headers(1) + peer.data(1, struct.pack(">BI", 0, 2**32 - 1), ends=False),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
}


def _parts(data: bytes) -> list[bytes]:
    return [data[start : start + 16_000] for start in range(0, len(data), 16_000)]


@pytest.mark.parametrize("request_", REFUSED)
async def test_a_request_that_can_not_be_read_is_told_so_and_the_next_one_is_served(served: Served, request_: str) -> None:
    said, code = REFUSED[request_]
    async with Peer(served.port) as peer:
        peer.send(said(peer))
        body, fields = await peer.answer(1)
        assert (body, fields["grpc-status"]) == (b"", str(code.value[0]))
        peer.send(peer.request(3))
        body, _ = await peer.answer(3)
        assert body == message(b"hi")
    assert await served.at_rest()


@pytest.mark.parametrize(("fields", "status"), [
    ({"content_type": "text/html"}, "415"), ({":method": "GET"}, "405"), ({"content_type": None}, "415"),
])
async def test_what_is_not_grpc_is_answered_as_http(served: Served, fields: dict[str, Any], status: str) -> None:
    async with Peer(served.port) as peer:
        peer.send(peer.headers(1, ends=True, **fields))
        _, answered = await peer.answer(1)
        assert answered == {":status": status}


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", frames.PREFACE + frames.frame(Kind.PING, 0, 0, bytes(8)), b"\x16\x03"])
async def test_a_client_of_another_protocol_is_sent_away(served: Served, said: bytes) -> None:
    async with Peer(served.port, greet=False) as peer:
        peer.send(said)
        assert await peer.until(Kind.GOAWAY) is not None
        assert await peer.is_closed()


async def test_a_client_that_says_nothing_is_sent_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PREFACE_SECONDS", 0.05)
    async with Peer(served.port, greet=False) as peer:
        peer.send(frames.PREFACE[:10])
        assert await peer.is_closed()


async def test_a_client_that_is_silently_gone_is_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEPALIVE_SECONDS", 0.1)
    monkeypatch.setattr(connection, "KEEPALIVE_ANSWER_SECONDS", 0.3)
    async with Peer(served.port) as peer:
        peer.send(peer.request(1, path="/test/Wait"))
        for _ in range(2):
            asked = await peer.until(Kind.PING)
            assert asked is not None
            peer.send(frames.frame(Kind.PING, Flag.ACK, 0, asked.payload))
        assert served.handlers.running == 1
        assert await peer.is_closed()
    await until(lambda: served.handlers.cancelled == 1)


async def test_more_streams_than_allowed_are_refused_unharmed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_STREAMS", 3)
    async with Peer(served.port) as peer:
        peer.send(*(peer.request(number, path="/test/Wait") for number in (1, 3, 5, 7)))
        reset = await peer.until(Kind.RST_STREAM)
        assert reset is not None
        assert (reset.stream_id, reset.code) == (7, ErrorCode.REFUSED_STREAM)
        served.handlers.gate.set()
        for number in (1, 3, 5):
            await peer.answer(number)
    assert served.server.calls_succeeded == 3


async def test_resets_without_end_are_asked_to_come_back_later(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SPARE_RESETS", 100)
    async with Peer(served.port) as peer:
        for number in range(1, 400, 2):
            peer.send(peer.request(number, path="/test/Wait"), frames.reset_frame(number, ErrorCode.CANCEL))
        goodbye = await peer.until(Kind.GOAWAY)
        assert goodbye is not None
        assert goodbye.code is ErrorCode.ENHANCE_YOUR_CALM
        assert await peer.is_closed()
    assert await served.at_rest()
    assert served.server.calls_begun < 150


async def test_a_client_that_cancels_half_of_its_calls_is_welcome(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SPARE_RESETS", 20)
    async with Peer(served.port) as peer:
        for number in range(1, 400, 4):
            peer.send(peer.request(number), peer.request(number + 2, path="/test/Wait"))
            await peer.answer(number)
            peer.send(frames.reset_frame(number + 2, ErrorCode.CANCEL))
        peer.send(peer.request(401))
        await peer.answer(401)


async def test_pings_whose_answers_are_not_read_end_the_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MOST_UNREAD_BYTES", 2**20)
    async with Peer(served.port) as peer:
        flood = frames.frame(Kind.PING, 0, 0, bytes(8)) * 10_000
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(30):
                while served.server.connections:
                    peer.writer.transport.get_extra_info("socket")
                    peer.send(flood)
                    await asyncio.sleep(0)
                    if peer.writer.transport.is_closing():
                        break
        await until(lambda: not served.server.connections)


async def test_unfinished_requests_can_not_fill_the_memory(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_call, "MOST_UNFINISHED_BYTES", 100_000)
    promise = struct.pack(">BI", 0, 10**6)
    async with Peer(served.port) as peer:
        for number in range(1, 100, 2):
            peer.send(peer.headers(number), peer.data(number, promise + bytes(15_000), ends=False))
        refused: Frame | None = await peer.until(Kind.HEADERS)
        assert refused is not None
        assert refused.fields["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        (one,) = served.server.connections.values()
        assert one.unfinished <= 100_000


# Listening


async def test_a_server_on_all_addresses_takes_ipv4_and_ipv6() -> None:
    sockets = listen("[::]:0")
    server = GrpcServer(sockets)
    server.add_registered_method_handlers("test", served_methods(Handlers()))
    await server.start()
    port = sockets[0].getsockname()[1]
    for host in ("127.0.0.1", "[::1]"):
        async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
            assert await channel.unary_unary("/test/Echo")(b"hi", timeout=5) == b"hi"
    await server.stop(0)


async def test_a_port_is_shared_only_when_all_want_it() -> None:
    (first,) = listen("127.0.0.1:0", share=True)
    address = f"127.0.0.1:{first.getsockname()[1]}"
    (second,) = listen(address, share=True)
    with pytest.raises(OSError, match="in use"):
        listen(address)
    first.close()
    second.close()


async def test_tls_speaks_http2_and_asks_for_certificates(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    sockets = listen("127.0.0.1:0")
    server = GrpcServer(sockets, tls=tls_context(made.cert, made.key, made.ca))
    server.add_registered_method_handlers("test", served_methods(Handlers()))
    await server.start()
    port = sockets[0].getsockname()[1]
    mutual = grpc.ssl_channel_credentials(made.ca.read_bytes(), made.key.read_bytes(), made.cert.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", mutual) as channel:
        assert await channel.unary_unary("/test/Echo")(LARGE, timeout=10) == LARGE
    alone = grpc.ssl_channel_credentials(made.ca.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", alone) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/test/Echo")(b"hi", timeout=2)
    context = ssl.create_default_context(cafile=str(made.ca))
    context.load_cert_chain(made.cert, made.key)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    assert await reader.read() == b""  # no h2 by ALPN
    writer.close()
    await server.stop(0)
