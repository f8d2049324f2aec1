"""Entries of the append-only ledger and the hash that chains them; docs/ledger-hash.md describes it for others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, IntFlag

from metering.charge import Rates
from metering.usage import Usage, UsageSource
from tokenstore_service.domain.period import EPOCH

FORM = 2
"""Form of the entries that are written now; form 1, without what came later, stays verifiable."""


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
    REPRICED = 1 << 5
    CORRECTED = 1 << 6


@dataclass(slots=True)
class Entry:
    """One row of an account's ledger. `amount_micros` is signed; seq counts from 1 without gaps.

    It never changes once it has its hash; it is not frozen because that would double the time to make one.

    `lots` says which lots an expense used, or an income went back to (`seq:micros,...`). What an income did not give
    back, and did not pay a debt with, is a new lot with the number of the entry and the `lot_` values here.
    A usage event of another service has `unit_type`, the decimal `unit_amount` and `unit_pico` instead of tokens.
    """

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
    form: int = FORM
    lots: str = ""
    lot_source: EntrySource | None = None
    lot_priority: int | None = None
    lot_expires_at: datetime | None = None
    order_id: str = ""
    actor: str = ""
    reverses_seq: int | None = None
    unit_type: str = ""
    unit_amount: str = ""
    unit_pico: int | None = None
    details: str = ""

    @property
    def is_expense(self) -> bool:
        return self.amount_micros < 0 or (self.amount_micros == 0 and self.source is EntrySource.CHARGE)

    @property
    def counts_as_consumption(self) -> bool:
        """Charges, and reversals of charges, which alone among reversals carry a scene."""
        return self.source is EntrySource.CHARGE or (self.source is EntrySource.REVERSAL and self.scene != "")


def microseconds_of(moment: datetime) -> int:
    """Exact microseconds since 1970."""
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def usage_numbers(usage: Usage) -> tuple[int, int, int, int, int, int, int]:
    return (
        usage.input_tokens, usage.cached_input_tokens, usage.cache_write_tokens, usage.output_tokens,
        usage.reasoning_tokens, usage.input_audio_tokens, usage.output_audio_tokens,
    )


def usage_from_numbers(numbers: tuple[int, ...] | list[int], source: UsageSource) -> Usage:
    values = (*numbers, *(0,) * (7 - len(numbers)))
    return Usage(values[0], values[1], values[2], values[3], values[4], values[5], values[6], source)


def rates_numbers(rates: Rates) -> tuple[int, ...]:
    return (
        rates.input_pico, rates.cached_input_pico, rates.cache_write_pico, rates.output_pico, rates.reasoning_pico,
        rates.input_audio_pico, rates.output_audio_pico, rates.per_call_pico,
    )


_NOTHING = "\n" * 7


def canonical_form(entry: Entry) -> bytes:
    """The bytes that an entry's hash covers, the hash before it aside: fields as text, joined by line feeds."""
    usage, rates = entry.usage, entry.rates
    used = _NOTHING if usage is None else (
        f"{usage.input_tokens}\n{usage.cached_input_tokens}\n{usage.cache_write_tokens}\n{usage.output_tokens}\n"
        f"{usage.reasoning_tokens}\n{usage.input_audio_tokens}\n{usage.output_audio_tokens}\n{int(usage.source)}"
    )
    priced = _NOTHING if rates is None else (
        f"{rates.input_pico}\n{rates.cached_input_pico}\n{rates.cache_write_pico}\n{rates.output_pico}\n"
        f"{rates.reasoning_pico}\n{rates.input_audio_pico}\n{rates.output_audio_pico}\n{rates.per_call_pico}"
    )
    text = (
        f"creditmesh-ledger-{entry.form}\n{entry.user_id}\n{entry.seq}\n{entry.event_id}\n{int(entry.source)}\n"
        f"{entry.amount_micros}\n{entry.balance_after_micros}\n{int(entry.status)}\n"
        f"{microseconds_of(entry.occurred_at)}\n{microseconds_of(entry.booked_at)}\n{entry.scene}\n{entry.model}\n"
        f"{entry.provider}\n{used}\n{entry.price_rule_id}\n{entry.price_rule_version}\n{priced}\n{entry.call_id}\n"
        f"{entry.request_id}\n{entry.conversation_id}\n{entry.reference}\n{entry.description}\n{int(entry.flags)}"
    )
    return (text if entry.form == 1 else f"{text}\n{_second_form(entry)}").encode()


def _second_form(entry: Entry) -> str:
    """What form 2 adds."""
    expires_at = entry.lot_expires_at
    return (
        f"{entry.lots}\n{_or_nothing(entry.lot_source)}\n{_or_nothing(entry.lot_priority)}\n"
        f"{'' if expires_at is None else microseconds_of(expires_at)}\n{entry.order_id}\n{entry.actor}\n"
        f"{_or_nothing(entry.reverses_seq)}\n{entry.unit_type}\n{entry.unit_amount}\n{_or_nothing(entry.unit_pico)}\n"
        f"{entry.details}"
    )


def _or_nothing(number: int | None) -> str:
    return "" if number is None else str(int(number))


def entry_hash(previous: bytes, entry: Entry) -> bytes:
    """SHA-256 over the hash before it and the canonical form."""
    return hashlib.sha256(previous + canonical_form(entry)).digest()
