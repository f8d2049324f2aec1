"""Entries of the append-only ledger and the hash that chains them.

The hash of an entry is SHA-256 over the hash before it (32 bytes; zeros for the first) and the entry's canonical form:
the fields in the order of `canonical_form`, as UTF-8 text, numbers in decimal, times in microseconds since 1970, absent
values empty, joined by line feeds. No field may hold a control character, so the form is unambiguous.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from datetime import datetime
from enum import IntEnum, IntFlag

from metering.charge import Rates
from metering.usage import Usage, UsageSource

HASH_VERSION = "creditmesh-ledger-1"


class EntrySource(IntEnum):
    """What kind of entry; numbers as on the wire."""

    PURCHASE = 1
    CHARGE = 2
    REWARD = 3
    ADJUSTMENT = 4
    REFUND = 5
    EXPIRY = 6
    REVERSAL = 7


class EntryStatus(IntEnum):
    """How an entry was booked; numbers as on the wire."""

    APPLIED = 1
    SKIPPED = 2
    UNPRICED = 3


class EntryFlag(IntFlag):
    """What is worth a look about an entry; bit n is number n of the wire's enum."""

    OVERRUN = 1 << 1
    LATE = 1 << 2
    NO_HOLD = 1 << 3
    QUOTE_MISMATCH = 1 << 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of an account's ledger. `amount_micros` is signed; seq counts from 1 without gaps."""

    user_id: str
    seq: int
    event_id: str
    source: EntrySource
    amount_micros: int
    balance_after_micros: int
    status: EntryStatus
    occurred_at: datetime
    booked_at: datetime
    scene: str = ""
    model: str = ""
    provider: str = ""
    usage: Usage | None = None
    price_rule_id: str = ""
    price_rule_version: int = 0
    rates: Rates | None = None
    call_id: str = ""
    request_id: str = ""
    conversation_id: str = ""
    reference: str = ""
    description: str = ""
    flags: EntryFlag = EntryFlag(0)
    entry_hash: bytes = b""

    @property
    def is_expense(self) -> bool:
        return self.amount_micros < 0 or (self.amount_micros == 0 and self.source is EntrySource.CHARGE)


def microseconds_of(moment: datetime) -> int:
    """Exact microseconds since 1970."""
    return int(moment.timestamp()) * 1_000_000 + moment.microsecond


def usage_numbers(usage: Usage) -> tuple[int, int, int, int, int, int, int]:
    return (
        usage.input_tokens, usage.cached_input_tokens, usage.cache_write_tokens, usage.output_tokens,
        usage.reasoning_tokens, usage.input_audio_tokens, usage.output_audio_tokens,
    )


def usage_from_numbers(numbers: tuple[int, ...] | list[int], source: UsageSource) -> Usage:
    values = (*numbers, *(0,) * (7 - len(numbers)))
    return Usage(values[0], values[1], values[2], values[3], values[4], values[5], values[6], source)


def rates_numbers(rates: Rates) -> tuple[int, ...]:
    return astuple(rates)


def canonical_form(entry: Entry) -> bytes:
    """The bytes that an entry's hash covers, the hash before it aside."""
    usage = (*usage_numbers(entry.usage), int(entry.usage.source)) if entry.usage else ("",) * 8
    rates = rates_numbers(entry.rates) if entry.rates else ("",) * 8
    fields = (
        HASH_VERSION, entry.user_id, entry.seq, entry.event_id, int(entry.source), entry.amount_micros,
        entry.balance_after_micros, int(entry.status), microseconds_of(entry.occurred_at),
        microseconds_of(entry.booked_at), entry.scene, entry.model, entry.provider, *usage, entry.price_rule_id,
        entry.price_rule_version, *rates, entry.call_id, entry.request_id, entry.conversation_id, entry.reference,
        entry.description, int(entry.flags),
    )
    return "\n".join(map(str, fields)).encode()


def entry_hash(previous: bytes, entry: Entry) -> bytes:
    """SHA-256 over the hash before it and the canonical form."""
    return hashlib.sha256(previous + canonical_form(entry)).digest()
