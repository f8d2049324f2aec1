"""Header fields of requests and answers: HPACK (RFC 7541) and what HTTP/2 demands of a request (RFC 9113, section 8.3).

Reading is the `hpack` library's. What is written is never put into the peer's table and never compressed: an answer has
two or three short fields, and so needs no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from servicekit.http2.frames import ErrorCode, Http2Error

STATUS_OK = b"\x88"
""":status 200 is field 8 of the static table."""
_STATUS_NAME = b"\x08"
_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority"})
_OF_ONE_CONNECTION = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})

Fields = Sequence[tuple[bytes, bytes]]


@dataclass(slots=True)
class RequestHeaders:
    """`fields` are in the order of their arrival, names in lower case."""

    method: bytes
    path: bytes
    authority: bytes
    fields: list[tuple[bytes, bytes]]
    content_length: int | None


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Literal fields without indexing (section 6.2.2)."""
    parts: list[bytes] = []
    for name, value in fields:
        parts += (b"\x00", _length(len(name)), name, _length(len(value)), value)
    return b"".join(parts)


def encode_status(status: int) -> bytes:
    return STATUS_OK if status == 200 else b"%b\x03%d" % (_STATUS_NAME, status)


def _length(value: int) -> bytes:
    """An integer with a prefix of 7 bits (section 5.1); the first bit is 0: no Huffman code."""
    if value < 127:
        return bytes((value,))
    rest, encoded = value - 127, bytearray(b"\x7f")
    while rest >= 128:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


def read_request(decoded: Fields, stream_id: int) -> RequestHeaders:
    """Raises Http2Error for a malformed request."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    content_length: int | None = None
    for name, value in decoded:
        if name[:1] == b":":
            if fields or name in pseudo or name not in _PSEUDO:
                raise _malformed("a pseudo-header is unknown, doubled or late", stream_id)
            pseudo[name] = value
        else:
            _require_well_formed(name, value, stream_id)
            fields.append((name, value))
            if name == b"content-length":
                if not value.isdigit() or len(value) > 18:
                    raise _malformed("content-length is no number", stream_id)
                content_length = int(value)
    path = pseudo.get(b":path")
    if b":method" not in pseudo or b":scheme" not in pseudo or not path:
        raise _malformed("a pseudo-header is missing", stream_id)
    return RequestHeaders(pseudo[b":method"], path, pseudo.get(b":authority", b""), fields, content_length)


def require_trailers(decoded: Fields, stream_id: int) -> None:
    """Raises Http2Error for malformed trailers."""
    for name, value in decoded:
        if name[:1] == b":":
            raise _malformed("trailers have a pseudo-header", stream_id)
        _require_well_formed(name, value, stream_id)


def _require_well_formed(name: bytes, value: bytes, stream_id: int) -> None:
    if not name or (not name.islower() and name != name.lower()):
        raise _malformed("a header's name is not in lower case", stream_id)
    if name in _OF_ONE_CONNECTION or (name == b"te" and value != b"trailers"):
        raise _malformed("a header is about a connection of HTTP/1", stream_id)


def _malformed(text: str, stream_id: int) -> Http2Error:
    return Http2Error(ErrorCode.PROTOCOL_ERROR, text, stream_id=stream_id)
