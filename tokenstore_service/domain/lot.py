"""Lots: credit that came in together. Charges use them up by priority, then earliest expiry, then oldest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

from tokenstore_service.domain.entry import EntrySource

FOR_EVER = datetime.max.replace(tzinfo=UTC)


class LotPriority(IntEnum):
    """Lower is spent first: what was given before what was paid for."""

    REWARD = 10
    ADJUSTMENT = 20
    PURCHASE = 30


@dataclass(slots=True)
class Lot:
    """Credit of one income entry, whose `seq` is the lot's number; micro-credits."""

    user_id: str
    seq: int
    source: EntrySource
    priority: int
    granted_micros: int
    remaining_micros: int
    expires_at: datetime | None
    order_id: str
    granted_at: datetime

    @property
    def rank(self) -> tuple[int, datetime, int]:
        """The order in which lots are spent."""
        return self.priority, self.expires_at or FOR_EVER, self.seq

    def is_due(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now


LotUse = tuple[int, int]
"""A lot's number and the micro-credits that went out of it, or came back to it."""


def uses_to_text(uses: Iterable[LotUse]) -> str:
    """`seq:micros` joined by commas, as the ledger keeps and hashes it."""
    return ",".join(f"{seq}:{micros}" for seq, micros in uses)


def uses_from_text(text: str) -> list[LotUse]:
    return [(int(seq), int(micros)) for seq, _, micros in (part.partition(":") for part in text.split(",") if part)]


def take_from(lots: Iterable[Lot], micros: int) -> list[LotUse]:
    """Takes up to `micros` out of lots in the order given; what they do not have is left to the balance."""
    uses: list[LotUse] = []
    for lot in lots:
        if micros <= 0:
            break
        part = min(lot.remaining_micros, micros)
        if part > 0:
            lot.remaining_micros -= part
            micros -= part
            uses.append((lot.seq, part))
    return uses
