"""What both sides of a gRPC call write: messages in their prefix, metadata, status messages, time limits.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from urllib.parse import unquote_to_bytes

import grpc

PREFIX = struct.Struct(">BI")
"""Of each message: whether it is compressed, and its length."""
WINDOW_BITS = {b"deflate": zlib.MAX_WBITS, b"gzip": zlib.MAX_WBITS | 16}
"""Of zlib, by the name of an encoding."""
OF_THE_PROTOCOL = frozenset({
    b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding", b"grpc-status", b"grpc-message",
})
"""Headers that are no metadata."""
_SECONDS_OF = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")

Metadata = Sequence[tuple[str, str | bytes]]


class RefusedError(Exception):
    """Something can not be read or taken; the caller is told why."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Metadata = ()) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.trailers = trailers


def framed(message: bytes) -> bytes:
    return PREFIX.pack(0, len(message)) + message


def too_large(what: str, most: int) -> RefusedError:
    return RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{what} is larger than {most} bytes")


def inflated(message: bytes, encoding: bytes, *, most: int) -> bytes:
    """Raises RefusedError for what is not compressed as it says, or is larger than `most` bytes when it is not."""
    bits = WINDOW_BITS.get(encoding)
    if bits is None:
        raise RefusedError(grpc.StatusCode.INTERNAL, "a message is compressed, and it is not told how")
    inflater = zlib.decompressobj(bits)
    try:
        data = inflater.decompress(message, most + 1)
    except zlib.error as error:
        raise RefusedError(grpc.StatusCode.INTERNAL, "a compressed message can not be read") from error
    if len(data) > most:
        raise too_large("a message", most)
    if not inflater.eof:
        raise RefusedError(grpc.StatusCode.INTERNAL, "a compressed message is cut off")
    return data


def timeout_to_bytes(seconds: float) -> bytes:
    """Milliseconds, rounded up, as long as eight digits are enough."""
    milliseconds = max(1, math.ceil(seconds * 1000))
    return b"%dm" % milliseconds if milliseconds < 10**8 else b"%dS" % min(math.ceil(seconds), 10**8 - 1)


def timeout_from_bytes(value: bytes) -> float:
    """Seconds. Raises RefusedError."""
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise RefusedError(grpc.StatusCode.INTERNAL, "grpc-timeout can not be read")
    return int(match[1]) * _SECONDS_OF[match[2].decode()]


def message_to_bytes(text: str) -> bytes:
    """A status message, percent-encoded."""
    return b"".join(
        bytes((each,)) if 0x20 <= each <= 0x7E and each != 0x25 else b"%%%02X" % each
        for each in text.encode("utf-8", "replace")
    )


def message_from_bytes(value: bytes) -> str:
    return unquote_to_bytes(value).decode("utf-8", "replace")


def metadata_to_fields(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    return [_to_field(name, value) for name, value in metadata]


def metadata_from_fields(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str | bytes]]:
    """Without what belongs to the protocol; `-bin` that can not be read is empty."""
    return [
        (name.decode("latin-1"), _from_base64(value) if name.endswith(b"-bin") else value.decode("latin-1"))
        for name, value in fields if name not in OF_THE_PROTOCOL and name[:1] != b":"
    ]


def _to_field(name: str, value: str | bytes) -> tuple[bytes, bytes]:
    raw = value.encode("latin-1", "replace") if isinstance(value, str) else value
    return name.lower().encode("ascii"), base64.b64encode(raw).rstrip(b"=") if name.endswith("-bin") else raw


def _from_base64(value: bytes) -> bytes:
    """Padded or not."""
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return b""
