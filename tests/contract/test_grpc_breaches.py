"""Our gRPC server before clients that are slow, that misbehave and that flood it; on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import struct
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from servicekit.http2 import connection, frames, server
from servicekit.http2.frames import ErrorCode, Flag, Kind, Setting
from servicekit.rpc import grpc_call
from tests.support.grpc_served import Served, until
from tests.support.http2_peer import Frame, Peer, message

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
