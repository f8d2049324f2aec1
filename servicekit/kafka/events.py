"""CloudEvents 1.0 in Kafka's binary mode: attributes as headers, data as the value."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

PROTOBUF = b"application/protobuf"
JSON = b"application/json"

Headers = list[tuple[str, str | bytes | None]]


def event_headers(
    *, event_id: str, event_type: str, source: str, time: datetime, traceparent: str = ""
) -> Headers:
    headers: Headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_type", event_type.encode()),
        ("ce_source", source.encode()),
        ("ce_time", time.isoformat().encode()),
        ("content-type", PROTOBUF),
    ]
    if traceparent:
        headers.append(("traceparent", traceparent.encode()))
    return headers


def header_of(headers: Headers | Sequence[tuple[str, bytes]] | None, name: str) -> bytes | None:
    """The last header of that name, or None."""
    for key, value in reversed(headers or ()):
        if key == name:
            return value.encode() if isinstance(value, str) else value
    return None
