"""HTTP to model servers, over real sockets: answers of every framing, connections kept and closed, addresses refused."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llm_service.clients import http_connection, http_pool
from llm_service.clients.http_connection import HttpAnswer
from llm_service.clients.upstream_http import UpstreamHttp, read_json
from llm_service.domain.deployment import BUILT_IN, Deployment, Timeouts
from llm_service.domain.routing import FailureKind
from llm_service.domain.upstream_address import Reach
from llm_service.usecases.ports import UpstreamFailure
from servicekit import dialing
from tests.support.certificates import Certificates

Talk = Callable[["Peer"], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BODY = b'{"answer":"caf\xc3\xa9"}'
WHOLE = OK + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


STREAM = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Peer:
    """One connection, as the server sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def request(self) -> tuple[bytes, bytes]:
        """Head and body of the next request."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
        return head, await self.reader.readexactly(length)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)


class Server:
    """Speaks as `talk` says, once for each connection."""

    def __init__(self) -> None:
        self.talk: Talk | None = None
        self.connections = 0
        self.open = 0
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, *, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        assert self.talk is not None
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await self.talk(Peer(reader, writer))
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def http() -> AsyncIterator[UpstreamHttp]:
    made = UpstreamHttp(Reach.LOOPBACK)
    yield made
    await made.close()


def deployment(server: Server, **fields: object) -> Deployment:
    return replace(BUILT_IN, base_url=f"http://127.0.0.1:{server.port}/v1", **fields)  # type: ignore[arg-type]


def post(
    http: UpstreamHttp, to: Deployment, *, on_sent: Callable[[], None] = lambda: None, **headers: str
) -> contextlib.AbstractAsyncContextManager[HttpAnswer]:
    return http.post(to, "/chat", b'{"q":1}', headers, query={}, on_sent=on_sent)


async def body_of(answer: HttpAnswer) -> bytes:
    pieces = []
    while piece := await answer.read():
        pieces.append(piece)
    return b"".join(pieces)


async def ask(http: UpstreamHttp, to: Deployment) -> bytes:
    async with post(http, to) as answer:
        return await body_of(answer)


def always(answer: bytes, *more: bytes) -> Talk:
    async def talk(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(answer, *more)

    return talk


ANSWERS = {
    "length": WHOLE,
    "chunked": STREAM + chunked(BODY[:5], BODY[5:]),
    "chunk extension and trailer": STREAM + b"%x;x=y\r\n%s\r\n0\r\nTrailer: t\r\n\r\n" % (len(BODY), BODY),
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 9\r\n\r\n" + WHOLE,
    "gzip": OK + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(gzip.compress(BODY, mtime=0)),
    "deflate": OK + b"Content-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(zlib.compress(BODY)),
    "http 1.0": WHOLE.replace(b"1.1", b"1.0"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_cut_anywhere_is_read_the_same(answer: bytes, server: Server, http: UpstreamHttp) -> None:
    cuts = iter(range(len(answer) + 1))

    async def talk(peer: Peer) -> None:
        while True:
            await peer.request()
            cut = next(cuts)
            await peer.say(answer[:cut], answer[cut:])
            if b"HTTP/1.0" in answer:
                return

    server.talk = talk
    for _ in range(len(answer) + 1):
        assert await ask(http, deployment(server)) == BODY


async def test_a_body_that_ends_with_the_connection(server: Server, http: UpstreamHttp) -> None:
    async def talk(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"\r\n" + BODY[:4], BODY[4:])

    server.talk = talk
    assert [await ask(http, deployment(server)) for _ in range(2)] == [BODY, BODY]
    assert server.connections == 2


async def test_what_is_sent(server: Server, http: UpstreamHttp) -> None:
    asked: list[tuple[bytes, bytes]] = []

    async def talk(peer: Peer) -> None:
        asked.append(await peer.request())
        await peer.say(WHOLE)

    server.talk = talk
    to = replace(
        deployment(server), base_url=f"http://localhost:{server.port}/a b/é",
        extra_headers=(("X-Own", "1"), ("Content-Length", "7"), ("Host", "evil"), ("x-version", "mine")),
    )
    async with http.post(
        to, "/chat", b"{}", {"x-version": "ours"}, query={"api-version": "2 b"}, on_sent=lambda: None
    ) as answer:
        assert await read_json(answer) == {"answer": "café"}
    (head, body), = asked
    lines = head.decode().split("\r\n")
    assert lines[:2] == ["POST /a%20b/%C3%A9/chat?api-version=2+b HTTP/1.1", f"Host: localhost:{server.port}"]
    assert sorted(lines[2:-2]) == [
        "Accept-Encoding: identity", "Content-Length: 2", "user-agent: creditmesh", "x-own: 1", "x-version: ours"
    ]
    assert body == b"{}"


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\nb", "a\rb", "a\0b"])
async def test_a_header_with_a_line_break_is_refused(value: str, server: Server, http: UpstreamHttp) -> None:
    server.talk = always(WHOLE)
    with pytest.raises(UpstreamFailure) as caught:
        async with post(http, deployment(server), authorization=value):
            pass
    assert caught.value.kind is FailureKind.MISCONFIGURED
    assert server.connections == 0


# Connections


async def test_a_connection_serves_one_request_after_another(server: Server, http: UpstreamHttp) -> None:
    server.talk = always(WHOLE)
    for _ in range(5):
        assert await ask(http, deployment(server)) == BODY
    assert server.connections == 1
    await asyncio.gather(*(ask(http, deployment(server)) for _ in range(5)))
    assert server.connections <= 5


async def test_a_connection_outlives_an_error_answer(server: Server, http: UpstreamHttp) -> None:
    error = b'{"error":{"code":"rate_limit_exceeded"}}'
    server.talk = always(b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: %d\r\n\r\n%s" % (len(error), error))
    for _ in range(3):
        with pytest.raises(UpstreamFailure) as caught:
            await ask(http, deployment(server))
        assert (caught.value.kind, caught.value.retry_after_seconds) == (FailureKind.LIMITED, 7)
    assert server.connections == 1


async def test_a_server_that_closes_is_connected_to_anew(server: Server, http: UpstreamHttp) -> None:
    async def says_so(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
        await peer.reader.read()  # until the client closes

    async def silently(peer: Peer) -> None:
        await peer.request()
        await peer.say(WHOLE)

    for number, talk in enumerate((says_so, silently), start=1):
        server.talk = talk
        for _ in range(3):
            await ask(http, deployment(server))
            await asyncio.sleep(0.02)
        assert server.connections == 3 * number
        assert server.open == 0


async def test_a_stream_left_at_its_end_mark_keeps_its_connection(server: Server, http: UpstreamHttp) -> None:
    async def talk(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(STREAM + b"6\r\n[DONE]\r\n")
            await asyncio.sleep(0.02)
            await peer.say(b"0\r\n\r\n")

    server.talk = talk
    for _ in range(3):
        async with post(http, deployment(server)) as answer:
            assert await answer.read() == b"[DONE]"
        await asyncio.sleep(0.05)
    assert server.connections == 1


async def test_nothing_of_an_answer_is_left_for_the_next(server: Server, http: UpstreamHttp) -> None:
    """Also what came unread before its reader left, and what came after."""
    unread = STREAM + chunked(b"[DONE]", b"A" * 1000)

    async def talk(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(unread[:-8])
            await asyncio.sleep(0.02)
            await peer.say(unread[-8:])
            await peer.request()
            await peer.say(WHOLE)

    server.talk = talk
    for reads_first, waits in ((True, 0.05), (False, 0.05), (True, 0.0), (False, 0.0)):
        async with post(http, deployment(server)) as answer:
            if reads_first:
                await answer.read()
            await asyncio.sleep(waits)
        await asyncio.sleep(0.05)
        assert await ask(http, deployment(server)) == BODY
    assert server.connections == 1


async def test_a_server_that_goes_on_after_the_end_is_left(
    server: Server, http: UpstreamHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "DRAIN_SECONDS", 0.05)

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.say(STREAM + b"6\r\n[DONE]\r\n")
        await peer.reader.read()

    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.say(STREAM + b"6\r\n[DONE]\r\n")
        while True:
            await peer.say(b"2000\r\n" + bytes(0x2000) + b"\r\n")

    for talk in (silent, endless):
        server.talk = talk
        async with post(http, deployment(server)) as answer:
            assert (await answer.read()).startswith(b"[DONE]")
        async with asyncio.timeout(5):
            while server.open:
                await asyncio.sleep(0.01)


async def test_a_caller_that_leaves_closes_the_connection(server: Server, http: UpstreamHttp) -> None:
    async def talk(peer: Peer) -> None:
        await peer.request()
        await peer.say(STREAM + b"2\r\nhi\r\n")
        await peer.reader.read()

    server.talk = talk
    with pytest.raises(RuntimeError, match="gone"):
        async with post(http, deployment(server)) as answer:
            assert await answer.read() == b"hi"
            raise RuntimeError("gone")
    waiting = asyncio.create_task(ask(http, deployment(server)))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(5):
        while server.open:
            await asyncio.sleep(0.01)
    assert server.connections == 2


async def test_a_reader_that_does_not_read_stops_the_server(server: Server, http: UpstreamHttp) -> None:
    sent = 0

    async def talk(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.say(STREAM)
        while sent < 200 * 2**20:
            await peer.say(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent += 0x10000
        await peer.say(b"0\r\n\r\n")

    server.talk = talk
    async with post(http, deployment(server)) as answer:
        stands = -1
        async with asyncio.timeout(30):
            while stands != sent or sent == 0:
                stands = sent
                await asyncio.sleep(0.2)
        assert sent < 100 * 2**20, "what the kernel's buffers hold, and no more"
        got = 0
        async with asyncio.timeout(60):
            while piece := await answer.read():
                got += len(piece)
    assert got == sent >= 200 * 2**20


async def test_idle_connections_are_closed_in_time(
    server: Server, http: UpstreamHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pool, "IDLE_SECONDS", 0.1)
    server.talk = always(WHOLE)
    await ask(http, deployment(server))
    assert server.open == 1
    async with asyncio.timeout(5):
        while server.open:
            await asyncio.sleep(0.01)


# What breaks


async def failure_of(http: UpstreamHttp, to: Deployment) -> tuple[bytes, UpstreamFailure, bool]:
    """What was delivered, what is wrong, and whether anything was sent."""
    got, sent = b"", []
    with pytest.raises(UpstreamFailure) as caught:
        async with post(http, to, on_sent=lambda: sent.append(True)) as answer:
            while piece := await answer.read():
                got += piece
    assert caught.value.reason == "UPSTREAM_UNAVAILABLE"
    return got, caught.value, bool(sent)


BROKEN = {
    "no answer": (b"", b"", "closed the connection"),
    "half a head": (b"HTTP/1.1 200 OK\r\nConte", b"", "closed the connection"),
    "half a body": (OK + b"Content-Length: 9\r\n\r\nhalf", b"half", "closed the connection"),
    "half a chunk": (STREAM + b"9\r\nhalf", b"half", "closed the connection"),
    "no end": (STREAM + b"4\r\nhalf\r\n", b"half", "closed the connection"),
    "not http": (b"SSH-2.0-OpenSSH_9\r\n", b"", "no HTTP"),
    "http 2": (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", b"", "no HTTP"),
    "bad chunk": (STREAM + b"4\r\nhalf\r\nzz\r\n", b"half", "no HTTP"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(20_000)), b"", "too long"),
    "switches protocols": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", b"", "no HTTP"),
    "not gzip": (OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nhalf", b"", "not compressed"),
    "half gzip": (
        OK + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(gzip.compress(b"half" * 9)[:-9]),
        b"half", "body is cut",
    ),
    "unknown encoding": (OK + b"Content-Encoding: zstd\r\nContent-Length: 4\r\n\r\nhalf", b"", "unknown way"),
}


@pytest.mark.parametrize(("answer", "delivered", "detail"), BROKEN.values(), ids=BROKEN)
async def test_what_came_before_the_break_is_delivered(
    answer: bytes, delivered: bytes, detail: str, server: Server, http: UpstreamHttp
) -> None:
    async def talk(peer: Peer) -> None:
        await peer.request()
        await peer.say(answer)

    server.talk = talk
    got, failure, sent = await failure_of(http, deployment(server))
    assert (got or delivered)[:4] == delivered
    assert detail in failure.detail
    assert failure.kind is FailureKind.UNAVAILABLE
    assert sent


async def test_a_server_that_speaks_unasked_is_left(server: Server, http: UpstreamHttp) -> None:
    async def talk(peer: Peer) -> None:
        await peer.request()
        await peer.say(WHOLE)
        await asyncio.sleep(0.02)
        await peer.say(WHOLE)
        await peer.reader.read()

    for talks in (talk, always(WHOLE + WHOLE)):
        server.talk, server.connections = talks, 0
        for _ in range(2):
            assert await ask(http, deployment(server)) == BODY
            await asyncio.sleep(0.05)
        assert server.connections == 2


async def test_nobody_listens(server: Server, http: UpstreamHttp) -> None:
    await server.stop()
    _, failure, sent = await failure_of(http, deployment(server))
    assert failure.detail == "ConnectionRefusedError"
    assert not sent
    await server.start()


async def test_a_name_that_leads_nowhere(server: Server, http: UpstreamHttp) -> None:
    to = replace(deployment(server), base_url="http://no-such-host.invalid/v1")
    for _ in range(2):
        _, failure, sent = await failure_of(http, to)
        assert (failure.detail, failure.kind, sent) == ("gaierror", FailureKind.UNAVAILABLE, False)


async def test_the_connect_timeout(server: Server, http: UpstreamHttp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(dialing.aiohappyeyeballs, "start_connection", never)
    _, failure, sent = await failure_of(http, deployment(server, timeouts=Timeouts(connect=0.05)))
    assert (failure.detail, sent) == ("the connect timeout passed", False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "0.0.0.0", "10.1.2.3"])
async def test_addresses_that_may_not_be_asked(host: str, server: Server) -> None:
    """Also those that a name only turns out to have when it is looked up."""
    server.talk = always(WHOLE)
    http = UpstreamHttp(Reach.PUBLIC)
    to = replace(deployment(server), base_url=f"http://{host}:{server.port}/v1")
    _, failure, sent = await failure_of(http, to)
    assert (failure.detail, failure.kind) == ("its address may not be asked", FailureKind.MISCONFIGURED)
    assert not sent
    assert server.connections == 0
    await http.close()


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates.cert, certificates.key)
    server = Server()
    server.talk = always(WHOLE)
    await server.start(tls=tls)
    to = replace(deployment(server), base_url=f"https://127.0.0.1:{server.port}/v1")
    http = UpstreamHttp(Reach.LOOPBACK)
    try:
        http_pool._tls.cache_clear()
        _, failure, sent = await failure_of(http, to)
        assert (failure.detail, sent) == ("SSLCertVerificationError", False)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
        http_pool._tls.cache_clear()
        for _ in range(3):
            assert await ask(http, to) == BODY
        assert server.connections == 1
        # The certificate is that of an address, not of this name.
        _, failure, _ = await failure_of(http, replace(to, base_url=f"https://localhost:{server.port}/v1"))
        assert failure.detail == "SSLCertVerificationError"
    finally:
        http_pool._tls.cache_clear()
        await http.close()
        await server.stop()
