"""A client of HTTP/2 that says exactly what a test wants, byte by byte; it answers nothing by itself."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field
from typing import Any, Self

import hpack

from servicekit.http2 import frames
from servicekit.http2.frames import ErrorCode, Flag, Kind, Setting

PATIENCE = 10.0


@dataclass
class Frame:
    """One that arrived; `fields` of HEADERS."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> ErrorCode:
        """Of RST_STREAM and GOAWAY."""
        return ErrorCode(struct.unpack(">I", self.payload[4:8] if self.kind == Kind.GOAWAY else self.payload)[0])

    @property
    def ends(self) -> bool:
        return bool(self.flags & Flag.END_STREAM)


def message(data: bytes, *, compressed: int = 0) -> bytes:
    """One message of gRPC."""
    return struct.pack(">BI", compressed, len(data)) + data


class Peer:
    """`async with Peer(port) as peer`: the preface and SETTINGS are sent."""

    def __init__(self, port: int, settings: dict[Setting, int] | None = None, *, greet: bool = True) -> None:
        self._port = port
        self._greeting = frames.PREFACE + frames.settings_frame(settings or {}) if greet else b""
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self.reader: asyncio.StreamReader = None  # type: ignore[assignment]
        self.writer: asyncio.StreamWriter = None  # type: ignore[assignment]

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.send(self._greeting)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    def block(self, path: str = "/test/Echo", **more: str) -> bytes:
        """Headers of a request; `grpc_timeout="1S"` and so on come on top, and `None` leaves one out."""
        fields: dict[str, Any] = {
            ":method": "POST", ":scheme": "http", ":path": path, ":authority": "test", "te": "trailers",
            "content-type": "application/grpc", **{name.replace("_", "-"): value for name, value in more.items()},
        }
        return bytes(self._encoder.encode([(name, value) for name, value in fields.items() if value is not None]))

    def headers(self, stream_id: int, path: str = "/test/Echo", *, ends: bool = False, **more: str) -> bytes:
        return frames.headers_frames(stream_id, self.block(path, **more), end_stream=ends)

    def data(self, stream_id: int, data: bytes, *, ends: bool = True) -> bytes:
        return frames.frame(Kind.DATA, Flag.END_STREAM if ends else 0, stream_id, data)

    def request(self, stream_id: int, data: bytes = b"hi", path: str = "/test/Echo", **more: str) -> bytes:
        return self.headers(stream_id, path, **more) + self.data(stream_id, message(data))

    async def frame(self) -> Frame | None:
        """The next one; None at the end of the connection."""
        async with asyncio.timeout(PATIENCE):
            try:
                upper, lower, kind, flags, stream_id = frames.HEADER.unpack(await self.reader.readexactly(9))
                payload = await self.reader.readexactly(upper << 8 | lower)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
        found = Frame(kind, flags, stream_id, payload)
        if kind == Kind.HEADERS:
            found.fields = {str(name): str(value) for name, value in self._decoder.decode(payload)}
        return found

    async def until(self, *kinds: int) -> Frame | None:
        """The next frame of these kinds; None when the connection ended before."""
        while (found := await self.frame()) is not None:
            if found.kind in kinds:
                return found
        return None

    async def answer(self, stream_id: int) -> tuple[bytes, dict[str, str]]:
        """Body and last headers of one answer. Fails when the stream is reset or the connection ends."""
        body = b""
        while True:
            found = await self.frame()
            assert found is not None, "the connection ended"
            assert found.kind != Kind.GOAWAY, found
            if found.stream_id != stream_id:
                continue
            assert found.kind != Kind.RST_STREAM, found
            body += found.payload if found.kind == Kind.DATA else b""
            if found.kind == Kind.HEADERS and found.ends:
                return body, found.fields

    async def is_closed(self) -> bool:
        """Waits for the end of the connection."""
        while await self.frame() is not None:
            pass
        return True
