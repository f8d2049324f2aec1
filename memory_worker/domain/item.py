"""What is remembered: facts as they are extracted, and items as they are kept."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID

MOST_CONTENT = 1000
MOST_TITLE = 64
FACT_LIFE = timedelta(days=180)
"""Facts are forgotten after so long without being said again; preferences and constraints are not."""


class MemoryType(IntEnum):
    """What kind of thing is remembered; numbers as on the wire."""

    PREFERENCE = 1
    CONSTRAINT = 2
    FACT = 3


class ItemStatus(IntEnum):
    """What became of an item; numbers as on the wire."""

    ACTIVE = 1
    SUPERSEDED = 2
    DELETED = 3
    EXPIRED = 4


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to remember, normalised: `digest` tells it apart from others of its user. `valid_until`: from when on
    it is no longer so, if that was said."""

    type: MemoryType
    title: str
    content: str
    confidence: float
    importance: float
    sensitivity: int
    is_explicit: bool
    valid_until: datetime | None = None

    @property
    def digest(self) -> str:
        return digest_of(self.type, self.content)

    def expiry(self, said_at: datetime) -> datetime | None:
        """When it is to be forgotten, unless it is said again."""
        ends = [each for each in (expiry_of(self.type, said_at), self.valid_until) if each is not None]
        return min(ends, default=None)


@dataclass(frozen=True, slots=True)
class Item:
    """A memory as it stands. World time is `valid_*`, the books' own time `created_at` and `updated_at`."""

    user_id: str
    item_id: UUID
    type: MemoryType
    title: str
    content: str
    confidence: float
    importance: float
    sensitivity: int
    is_explicit: bool
    status: ItemStatus
    version: int
    valid_from: datetime
    valid_to: datetime | None
    expires_at: datetime | None
    created_at: datetime
    updated_at: datetime
    superseded_by: UUID | None = None
    conversation_id: str = ""
    message_id: str = ""
    job_id: UUID | None = None
    confirmations: int = 0

    @property
    def digest(self) -> str:
        return digest_of(self.type, self.content)


def one_line(text: str, most: int) -> str:
    """NFKC, without control characters, white space collapsed, at most `most` characters."""
    folded = unicodedata.normalize("NFKC", text)
    clean = "".join(
        letter if letter.isprintable() else " " for letter in folded if unicodedata.category(letter) != "Cf"
    )
    return " ".join(clean.split())[:most].strip()


def normalised(text: str) -> str:
    """What two wordings are compared by: one line, case folded, without punctuation at its end. Every writer's contents
    go through this, so that the same words have the same digest wherever they come from."""
    return one_line(text, MOST_CONTENT).casefold().rstrip(" .!;,:\u3002\uff01")


def digest_of(kind: MemoryType, content: str) -> str:
    """SHA-256 of type and normalised content, hexadecimal."""
    return hashlib.sha256(f"{kind.name}::{normalised(content)}".encode()).hexdigest()


def title_of(title: str, content: str) -> str:
    return one_line(title, MOST_TITLE) or one_line(content, MOST_TITLE)


def expiry_of(kind: MemoryType, said_at: datetime) -> datetime | None:
    return said_at + FACT_LIFE if kind is MemoryType.FACT else None
