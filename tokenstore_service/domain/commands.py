"""What can be asked of the books, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID

from metering.charge import Quote
from metering.usage import Usage
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Set credit aside for a call. Tokens >= 0, min_output_tokens <= max_output_tokens."""

    hold_id: UUID
    user_id: str
    request_id: str
    scene: str
    provider: str
    model: str
    input_tokens: int
    max_output_tokens: int
    min_output_tokens: int
    ttl: timedelta
    request_fingerprint: bytes = b""
    skip_charge: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class HoldGranted:
    """The hold, and the price that was quoted; None when no rule matches."""

    hold: Hold
    quote: Quote | None


@dataclass(frozen=True, slots=True)
class HoldRefused:
    """Why not: INSUFFICIENT_CREDIT, REQUEST_IN_FLIGHT, REQUEST_FINISHED or IDEMPOTENCY_CONFLICT."""

    reason: str
    needed_micros: int = 0
    available_micros: int = 0
    existing_call_id: str = ""


@dataclass(frozen=True, slots=True)
class ExtendHold:
    """Move the expiry of an open hold to now + ttl, never back."""

    user_id: str
    hold_id: UUID
    ttl: timedelta


@dataclass(frozen=True, slots=True)
class ReleaseHold:
    """Give an open hold back without a charge."""

    user_id: str
    hold_id: UUID


@dataclass(frozen=True, slots=True)
class ExpireHold:
    """Close an open hold whose time has run out."""

    user_id: str
    hold_id: UUID


@dataclass(frozen=True, slots=True)
class HoldChanged:
    """A hold's state now; None when there is no such hold."""

    hold_id: UUID
    state: HoldState | None
    at: datetime | None


@dataclass(frozen=True, slots=True)
class RecordCharge:
    """Book what a call used. Without a quote it is priced at occurred_at."""

    event_id: str
    user_id: str
    call_id: UUID | None
    request_id: str
    scene: str
    provider: str
    model: str
    usage: Usage
    quote: Quote | None
    occurred_at: datetime
    skip_charge: bool = False
    conversation_id: str = ""


class RecordStatus(IntEnum):
    """What became of a charge; numbers as on the wire."""

    APPLIED = 1
    DUPLICATE = 2
    CONFLICT = 3
    UNPRICED = 4
    REJECTED = 5


@dataclass(frozen=True, slots=True)
class ChargeRecorded:
    """The entry's number and micro-credits; 0 without an entry."""

    status: RecordStatus
    seq: int = 0
    credit_micros: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AdjustBalance:
    """An operator's correction; the idempotency key is the entry's event id."""

    user_id: str
    amount_micros: int
    reason: str
    reference: str
    idempotency_key: str


@dataclass(frozen=True, slots=True)
class BalanceAdjusted:
    """The entry, and the account after it."""

    entry: Entry
    account: Account


@dataclass(frozen=True, slots=True)
class ChargeIssue:
    """A charge that is not simply applied, kept for people."""

    user_id: str
    event_id: str
    kind: str
    detail: str
    original: RecordCharge


Command = OpenHold | ExtendHold | ReleaseHold | ExpireHold | RecordCharge | AdjustBalance
Answer = HoldGranted | HoldRefused | HoldChanged | ChargeRecorded | BalanceAdjusted
