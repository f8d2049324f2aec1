"""Rows <-> domain, in pairs. Column lists here are the order of every SELECT and COPY."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from metering.charge import Rates
from metering.usage import UsageSource
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.entry import (
    Entry,
    EntryFlag,
    EntrySource,
    EntryStatus,
    rates_numbers,
    usage_from_numbers,
    usage_numbers,
)
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.price_rule import PriceRule, PriceRuleStatus
from tokenstore_service.storage import tables

Row = tuple[Any, ...]

ACCOUNT_COLUMNS = ", ".join(tables.account.columns.keys())
ENTRY_COLUMNS = ", ".join(tables.ledger_entry.columns.keys())
HOLD_COLUMNS = ", ".join(tables.hold.columns.keys())
PRICE_RULE_COLUMNS = ", ".join(tables.price_rule.columns.keys()[:-1])

PRICE_RULE_FIELDS = tables.price_rule.columns.keys()[:22]

_NO_USAGE = (None,) * 8
_NO_RATES = (None,) * 8
_TYPE_NAMES = {
    "TEXT": "text", "BIGINT": "int8", "SMALLINT": "int2", "INTEGER": "int4", "BYTEA": "bytea", "BOOLEAN": "bool",
    "TIMESTAMP WITH TIME ZONE": "timestamptz", "UUID": "uuid",
}


def copy_types(table: Any) -> list[str]:
    """PostgreSQL's type names of a table's columns, for binary COPY."""
    from sqlalchemy.dialects import postgresql

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # the library has no types here
    return [_TYPE_NAMES[column.type.compile(dialect)] for column in table.columns]


def account_from_row(row: Row) -> Account:
    return Account(*row)


def account_to_row(account: Account) -> Row:
    return (
        account.user_id, account.balance_micros, account.held_micros, account.overdraft_limit_micros,
        account.total_recharged_micros, account.total_rewarded_micros, account.total_consumed_micros, account.seq,
        account.head_hash, account.updated_at,
    )


def entry_from_row(row: Row) -> Entry:
    usage, rates = row[12:19], row[22:30]
    return Entry(
        user_id=row[0], seq=row[1], event_id=row[2], source=EntrySource(row[3]), amount_micros=row[4],
        balance_after_micros=row[5], status=EntryStatus(row[6]), occurred_at=row[7], booked_at=row[8], scene=row[9],
        model=row[10], provider=row[11],
        usage=None if row[19] is None else usage_from_numbers(usage, UsageSource(row[19])),
        price_rule_id=row[20], price_rule_version=row[21], rates=None if rates[0] is None else Rates(*rates),
        call_id="" if row[30] is None else str(row[30]), request_id=row[31], conversation_id=row[32],
        reference=row[33], description=row[34], flags=EntryFlag(row[35]), entry_hash=row[36],
    )


def entry_to_row(entry: Entry) -> Row:
    usage = _NO_USAGE if entry.usage is None else (*usage_numbers(entry.usage), int(entry.usage.source))
    rates = _NO_RATES if entry.rates is None else rates_numbers(entry.rates)
    return (
        entry.user_id, entry.seq, entry.event_id, int(entry.source), entry.amount_micros, entry.balance_after_micros,
        int(entry.status), entry.occurred_at, entry.booked_at, entry.scene, entry.model, entry.provider, *usage,
        entry.price_rule_id, entry.price_rule_version, *rates, UUID(entry.call_id) if entry.call_id else None,
        entry.request_id, entry.conversation_id, entry.reference, entry.description, int(entry.flags),
        entry.entry_hash,
    )


def hold_from_row(row: Row) -> Hold:
    return Hold(
        user_id=row[0], hold_id=row[1], request_id=row[2], scene=row[3], provider=row[4], model=row[5],
        held_micros=row[6], input_tokens=row[7], max_output_tokens=row[8], asked_output_tokens=row[9],
        price_rule_id=row[10], price_rule_version=row[11], request_fingerprint=row[12], skip_charge=row[13],
        origin=row[14], state=HoldState(row[15]), opened_at=row[16], expires_at=row[17], closed_at=row[18],
    )


def hold_to_row(hold: Hold) -> Row:
    return (
        hold.user_id, hold.hold_id, hold.request_id, hold.scene, hold.provider, hold.model, hold.held_micros,
        hold.input_tokens, hold.max_output_tokens, hold.asked_output_tokens, hold.price_rule_id,
        hold.price_rule_version, hold.request_fingerprint, hold.skip_charge, hold.origin, int(hold.state),
        hold.opened_at, hold.expires_at, hold.closed_at,
    )


def price_rule_from_row(row: Row) -> PriceRule:
    values = dict(zip(PRICE_RULE_FIELDS, row[:22], strict=True))
    values["status"] = PriceRuleStatus(values["status"])
    return PriceRule(**values, rates=Rates(*row[22:30]))


def price_rule_to_row(rule: PriceRule) -> Row:
    return (
        rule.rule_id, rule.version, rule.scene, rule.provider, rule.model, rule.currency, rule.input_price,
        rule.output_price, rule.cached_input_price, rule.cache_write_price, rule.reasoning_price,
        rule.input_audio_price, rule.output_audio_price, rule.per_call_price, rule.credits_per_currency_unit,
        rule.markup_bps, rule.priority, int(rule.status), rule.valid_from, rule.valid_to, rule.description,
        rule.created_at, *rates_numbers(rule.rates),
    )
