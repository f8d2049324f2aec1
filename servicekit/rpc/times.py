"""Times and durations as they travel."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from servicekit.core.errors import InvalidField

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(9000, 1, 1, tzinfo=UTC)


def timestamp_from_proto(message: Timestamp, *, field: str) -> datetime:
    """Raises InvalidField outside the years 1970 to 9000."""
    try:
        moment = message.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InvalidField.of(field, "is not a valid time") from None
    if not EARLIEST <= moment < LATEST:
        raise InvalidField.of(field, "must be between the years 1970 and 9000")
    return moment


def timestamp_to_proto(moment: datetime) -> Timestamp:
    since = moment - EARLIEST
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def optional_timestamp_to_proto(moment: datetime | None) -> Timestamp | None:
    return None if moment is None else timestamp_to_proto(moment)


def duration_from_proto(message: Duration) -> timedelta:
    return timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def duration_to_proto(seconds: float) -> Duration:
    """Of a time that is not negative."""
    nanos = int(seconds * 1e9)
    return Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
