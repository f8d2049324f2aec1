"""Events on their way out, and who takes them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

LANES = 64
"""Messages of one key share a lane, and a lane has one relay at a time: that keeps the order per key across replicas.
More lanes than replicas will ever be; changing the number needs an empty outbox."""


def lane_of(key: str) -> int:
    return zlib.crc32(key.encode()) % LANES


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """One event: identity (key, event_id), order per key."""

    message_id: int
    key: str
    event_id: str
    event_type: str
    topic: str
    payload: bytes
    created_at: datetime
    traceparent: str = ""
    """The trace that it belongs to (W3C Trace Context); empty = none."""


class Publisher(Protocol):
    """Takes messages for good: a message counts as published only when the receiver has confirmed it."""

    async def publish(self, messages: Sequence[OutboxMessage]) -> Sequence[Exception | None]:
        """For each message None, or why it was not confirmed. Raises when none was."""
        ...
