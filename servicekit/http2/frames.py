"""HTTP/2 frames as bytes (RFC 9113, sections 4, 6 and 7): what is sent, and the few rules about what arrives."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_SIZE = 9
HEADER = struct.Struct(">HBBBI")
"""Length (upper 16 bits, lower 8), type, flags, stream."""
STREAM_MASK = 0x7FFFFFFF
MOST_WINDOW = 2**31 - 1
MOST_STREAM_ID = STREAM_MASK - 1
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_SIZE = 16_384
MOST_FRAME_SIZE = 2**24 - 1


class Kind:
    """Section 6. Plain numbers, as flags are: members of an Enum cost a microsecond for each frame."""

    DATA: Final = 0
    HEADERS: Final = 1
    PRIORITY: Final = 2
    RST_STREAM: Final = 3
    SETTINGS: Final = 4
    PUSH_PROMISE: Final = 5
    PING: Final = 6
    GOAWAY: Final = 7
    WINDOW_UPDATE: Final = 8
    CONTINUATION: Final = 9


class Flag:
    """ACK shares its bit with END_STREAM, which other kinds have."""

    ACK: Final = 0x1
    END_STREAM: Final = 0x1
    END_HEADERS: Final = 0x4
    PADDED: Final = 0x8
    PRIORITY: Final = 0x20


class ErrorCode(IntEnum):
    """Section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(IntEnum):
    """Section 6.5.2."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Http2Error(Exception):
    """The peer broke the protocol: the connection ends, or, with `stream_id`, that stream alone."""

    def __init__(self, code: ErrorCode, text: str, *, stream_id: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.stream_id = stream_id


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    return HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return frame_header(len(payload), kind, flags, stream_id) + payload


def settings_frame(settings: dict[Setting, int]) -> bytes:
    return frame(Kind.SETTINGS, 0, 0, b"".join(struct.pack(">HI", *each) for each in settings.items()))


def settings_from(payload: bytes) -> list[tuple[int, int]]:
    """Identifiers and values in order; unknown ones too. Raises Http2Error for what may not be said."""
    if len(payload) % 6:
        raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS is no multiple of 6")
    settings: list[tuple[int, int]] = list(struct.iter_unpack(">HI", payload))
    for name, value in settings:
        if name == Setting.ENABLE_PUSH and value > 1:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
        if name == Setting.INITIAL_WINDOW_SIZE and value > MOST_WINDOW:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
        if name == Setting.MAX_FRAME_SIZE and not DEFAULT_FRAME_SIZE <= value <= MOST_FRAME_SIZE:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of bounds")
    return settings


def window_update_frame(stream_id: int, increment: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def reset_frame(stream_id: int, code: ErrorCode) -> bytes:
    return frame(Kind.RST_STREAM, 0, stream_id, code.to_bytes(4, "big"))


def goaway_frame(last_stream_id: int, code: ErrorCode, text: str = "") -> bytes:
    return frame(Kind.GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + text.encode())


def data_frames(stream_id: int, data: bytes, most_frame: int) -> bytes:
    """A body's part in as many frames as it needs; it does not end there."""
    parts: list[bytes] = []
    for start in range(0, len(data), most_frame):
        part = data[start : start + most_frame]
        parts += (frame_header(len(part), Kind.DATA, 0, stream_id), part)
    return b"".join(parts)


def error_code(payload: bytes) -> ErrorCode:
    """Of RST_STREAM; codes that are not known mean the same as INTERNAL_ERROR (section 7)."""
    try:
        return ErrorCode(int.from_bytes(payload, "big"))
    except ValueError:
        return ErrorCode.INTERNAL_ERROR


def headers_frames(stream_id: int, block: bytes, *, end_stream: bool, most_frame: int = DEFAULT_FRAME_SIZE) -> bytes:
    """A block of headers in as many frames as it needs."""
    flags = Flag.END_STREAM if end_stream else 0
    if len(block) <= most_frame:
        return frame(Kind.HEADERS, flags | Flag.END_HEADERS, stream_id, block)
    parts = [block[start : start + most_frame] for start in range(0, len(block), most_frame)]
    frames = [frame(Kind.HEADERS, flags, stream_id, parts[0])]
    frames += [frame(Kind.CONTINUATION, 0, stream_id, part) for part in parts[1:-1]]
    return b"".join([*frames, frame(Kind.CONTINUATION, Flag.END_HEADERS, stream_id, parts[-1])])


def without_padding(flags: int, payload: bytes) -> bytes:
    """The content of DATA or HEADERS. Raises Http2Error when there is more padding than payload."""
    if not flags & Flag.PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "padding is longer than the frame")
    return payload[1 : len(payload) - payload[0]]
