"""Our gRPC server before gRPC's clients and before bytes as the network cuts them; its end; where it listens."""

from __future__ import annotations

import asyncio
import ssl
import struct
from pathlib import Path

import grpc
import grpc.aio
import pytest

from servicekit.http2 import frames
from servicekit.http2.frames import ErrorCode, Flag, Kind
from servicekit.rpc import grpc_call
from servicekit.rpc.grpc_server import GrpcServer, listen, tls_context
from tests.support.certificates import Certificates
from tests.support.grpc_served import LARGE, Handlers, Served, served_methods, until
from tests.support.http2_peer import Peer, message

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
