"""Header fields of requests and answers: HPACK (RFC 7541) and what HTTP/2 demands of a request (RFC 9113, section 8.3).

Reading is the `hpack` library's. What is written is never put into the peer's table and never compressed: an answer has
two or three short fields, and so needs no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import hpack

from servicekit.http2.frames import ErrorCode, Http2Error

_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority"})
_OF_ONE_CONNECTION = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})

MOST_KNOWN_BLOCKS = 16
MOST_KNOWN_BYTES = 1024
_RESIZES = 0x20
"""The first bits of a block that changes the table's size (RFC 7541, section 6.3)."""

Fields = Sequence[tuple[bytes, bytes]]


@dataclass(slots=True)
class Block:
    """Fields as they arrived, and the request that they are, once it was read."""

    fields: Fields
    request: RequestHeaders | None = None


@dataclass(slots=True)
class RequestHeaders:
    """`fields` are in the order of their arrival, names in lower case. `meaning` is what the layer above made of them:
    a client says the same headers again and again, and they are the same object then."""

    method: bytes
    path: bytes
    fields: list[tuple[bytes, bytes]]
    content_length: int | None
    meaning: Any = None


class BlockReader:
    """Blocks of headers of one connection, decoded. A block that was read before, and since when the table that both
    sides keep has not changed, is not decoded again."""

    def __init__(self, *, most_bytes: int) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=most_bytes)
        self._known: dict[bytes, Block] = {}

    def read(self, block: bytes) -> Block:
        """Raises Http2Error."""
        known = self._known.get(block)
        if known is not None:
            return known
        table = self._decoder.header_table.dynamic_entries
        before = (len(table), table[0] if table else None)
        try:
            read = Block(cast("Fields", self._decoder.decode(block, raw=True)))
        except hpack.HPACKError as error:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "a block of headers can not be read") from error
        has_changed = len(table) != before[0] or (table and table[0] is not before[1])
        if has_changed or len(self._known) >= MOST_KNOWN_BLOCKS:
            self._known.clear()  # those that matter are soon there again
        if not has_changed and 0 < len(block) <= MOST_KNOWN_BYTES and block[0] & 0xE0 != _RESIZES:
            self._known[block] = read
        return read


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Literal fields without indexing (section 6.2.2)."""
    parts: list[bytes] = []
    for name, value in fields:
        parts += (b"\x00", _length(len(name)), name, _length(len(value)), value)
    return b"".join(parts)


def encode_status(status: int) -> bytes:
    """Field 8 of the static table is `:status 200`, and lends its name to the others."""
    return b"\x88" if status == 200 else b"\x08\x03%d" % status


def encode_request(path: bytes, authority: bytes, *, secure: bool) -> bytes:
    """The pseudo-headers of a POST, by the static table (RFC 7541, appendix A)."""
    scheme = b"\x87" if secure else b"\x86"
    return b"".join((b"\x83", scheme, b"\x04", _length(len(path)), path, b"\x01", _length(len(authority)), authority))


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
    return RequestHeaders(pseudo[b":method"], path, fields, content_length)


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
