"""One HTTP/1.1 connection to a model server: a request at a time, its answer parsed by llhttp and read no faster than
its reader takes it.

It exists because a general client costs more per call than all the rest of a call's way to the model; benchmarks/ has
the figures. It knows what model servers need: POST with a body that is at hand, answers of any framing, kept-alive
connections.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping
from typing import cast

import httptools

READ_BYTES = 2**15
"""Beyond twice this, a connection is not read until its reader takes what came: a slow client costs no memory."""
MOST_HEADER_BYTES = 2**16
DRAIN_SECONDS = 1.0
"""An answer that was read to its end mark gets so long for the last bytes of its framing."""
DRAIN_BYTES = 2**16


class HttpBroken(Exception):
    """The server left, or what it sent is no HTTP; tells no content."""


class HttpAnswer:
    """An answer's status and headers (names in lower case, the last of several), and its body as it comes."""

    def __init__(self, connection: HttpConnection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._connection = connection
        self._inflate: zlib._Decompress | None = None

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """What came since the last read, or else the next that comes; empty at the end. Raises HttpBroken when the body
        ends too early."""
        if self._inflate is None:
            return await self._connection.next_piece()
        while True:
            raw = self._inflate.unconsumed_tail or await self._connection.next_piece()
            try:
                piece = self._inflate.decompress(raw, READ_BYTES) if raw else self._inflate.flush()
            except zlib.error:
                raise HttpBroken("the body is not compressed as its header says") from None
            if piece:
                return piece
            if not raw:
                if not self._inflate.eof:
                    raise HttpBroken("the compressed body is cut")
                return b""

    def begin_body(self) -> None:
        """All headers are there. Raises HttpBroken for a compression that was not asked for and is not known."""
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding in ("gzip", "deflate"):
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        elif encoding != "identity":
            raise HttpBroken("the body is compressed in an unknown way")


class HttpConnection(asyncio.Protocol):
    """`on_idle` is told when it may carry the next request, `on_lost` when it never will again."""

    def __init__(
        self, *, on_idle: Callable[[HttpConnection], None], on_lost: Callable[[HttpConnection], None]
    ) -> None:
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._drain: asyncio.TimerHandle | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._header_bytes = self._drained = 0
        self._answer: HttpAnswer | None = None
        self._has_headers = self._is_complete = self._ends_by_closing = self._keeps_alive = self._is_paused = False
        self._broken: HttpBroken | None = None
        self.idle_since = 0.0

    # For who asks

    @property
    def is_open(self) -> bool:
        return self._broken is None and self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> None:
        """Writes a request. The connection must be idle."""
        assert self._transport is not None
        assert self._answer is None
        self._answer = HttpAnswer(self)
        self._has_headers = self._is_complete = self._ends_by_closing = False
        self._header_bytes = self._drained = 0
        self._transport.write(request)

    async def answer(self) -> HttpAnswer:
        """The answer to what was sent, once its headers are there. Raises HttpBroken."""
        assert self._answer is not None
        while not self._has_headers:
            await self._something_new()
        return self._answer

    async def next_piece(self) -> bytes:
        while not self._pieces:
            if self._is_complete:
                return b""
            await self._something_new()
        piece = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._take_all()
        return piece

    def release(self) -> None:
        """The answer was read as far as it matters. What is still to come of it is thrown away, if it comes soon."""
        self._take_all()
        if self._is_complete:
            self._end_of_answer()
        elif self.is_open:
            self._drain = self._loop.call_later(DRAIN_SECONDS, self.abort)

    def abort(self) -> None:
        """Closes at once; the server learns of it."""
        if self._broken is None:
            self._broken = HttpBroken("the connection was closed")
        if self._transport is not None:
            self._transport.abort()

    def _take_all(self) -> None:
        """Nothing of one answer is left for the next one's reader."""
        self._pieces.clear()
        self._size = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    async def _something_new(self) -> None:
        if self._broken is not None:
            raise self._broken
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end_of_answer(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None
        self._answer = None
        if self.is_open:
            if self._keeps_alive:
                self._on_idle(self)
            else:
                self.abort()

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = HttpBroken(why)
        self.abort()
        self._wake()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self._break("the server spoke without being asked")
            return
        if not self._has_headers:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            known = error.__context__
            self._break(str(known) if isinstance(known, HttpBroken) else "the answer is no HTTP")
            return
        if not self._has_headers and self._header_bytes > MOST_HEADER_BYTES:
            self._break("the headers are too long")
            return
        if self._drain is not None:
            self._drained += self._size
            self._take_all()
            if self._is_complete:
                self._end_of_answer()
            elif self._drained > DRAIN_BYTES:
                self.abort()
        elif self._size > 2 * READ_BYTES and not self._is_complete and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._broken is None:
            self._is_complete = self._is_complete or (self._ends_by_closing and exc is None)
            self._broken = HttpBroken("the server closed the connection")
        if self._drain is not None:
            self._drain.cancel()
        self._on_lost(self)
        self._wake()

    # llhttp

    def on_message_begin(self) -> None:
        if self._is_complete:
            raise HttpBroken("the server answered more than it was asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None and not self._has_headers:
            self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        answer = self._answer
        if answer is None:
            return
        if status < 200:
            # Interim: the answer follows.
            answer.headers.clear()
            return
        answer.status = status
        self._ends_by_closing = not is_framed(status, answer.headers)
        answer.begin_body()
        self._has_headers = True

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)

    def on_message_complete(self) -> None:
        if self._has_headers:
            self._is_complete = True
            self._keeps_alive = self._parser.should_keep_alive()


def is_framed(status: int, headers: Mapping[str, str]) -> bool:
    """Whether an answer tells where its body ends (RFC 9112, 6.3); otherwise the end of the connection does."""
    chunked = headers.get("transfer-encoding", "").lower().rstrip().endswith("chunked")
    return chunked or "content-length" in headers or status in (204, 304)
