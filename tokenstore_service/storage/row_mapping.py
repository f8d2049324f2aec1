"""Rows <-> domain, in pairs. Column lists here are the order of every SELECT and COPY."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from metering.charge import Rates
from metering.usage import UsageSource
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.budget import Budget
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
from tokenstore_service.domain.lot import Lot
from tokenstore_service.domain.order import Order, OrderStatus, OrderStep, Product, ProductStatus
from tokenstore_service.domain.period import Limit, Period, Slot
from tokenstore_service.domain.price_rule import PriceRule, PriceRuleStatus, UnitPrice
from tokenstore_service.domain.reward import RewardRule
from tokenstore_service.storage import tables

Row = tuple[Any, ...]

ACCOUNT_COLUMNS = ", ".join(tables.account.columns.keys())
ENTRY_COLUMNS = ", ".join(tables.ledger_entry.columns.keys())
HOLD_COLUMNS = ", ".join(tables.hold.columns.keys())
LOT_COLUMNS = ", ".join(tables.lot.columns.keys())
ORDER_COLUMNS = ", ".join(tables.credit_order.columns.keys())
SLOT_COLUMNS = ", ".join(tables.limit_slot.columns.keys())
BUDGET_COLUMNS = ", ".join(tables.budget.columns.keys())
PRODUCT_COLUMNS = ", ".join(tables.product.columns.keys()[:-1])
REWARD_COLUMNS = ", ".join(tables.reward_rule.columns.keys()[:-1])
PRICE_RULE_COLUMNS = ", ".join(name for name in tables.price_rule.columns.keys() if name != "idempotency_key")

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
        account.head_hash, account.updated_at, account.version, account.head_lot, account.head_lot_micros,
        account.next_expiry_at, account.has_budgets, account.low_level,
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
        form=row[37], lots=row[38], lot_source=None if row[39] is None else EntrySource(row[39]), lot_priority=row[40],
        lot_expires_at=row[41], order_id=row[42], actor=row[43], reverses_seq=row[44], unit_type=row[45],
        unit_amount=row[46], unit_pico=row[47], details=row[48],
    )


def entry_to_row(entry: Entry) -> Row:
    usage = _NO_USAGE if entry.usage is None else (*usage_numbers(entry.usage), int(entry.usage.source))
    rates = _NO_RATES if entry.rates is None else rates_numbers(entry.rates)
    return (
        entry.user_id, entry.seq, entry.event_id, int(entry.source), entry.amount_micros, entry.balance_after_micros,
        int(entry.status), entry.occurred_at, entry.booked_at, entry.scene, entry.model, entry.provider, *usage,
        entry.price_rule_id, entry.price_rule_version, *rates, UUID(entry.call_id) if entry.call_id else None,
        entry.request_id, entry.conversation_id, entry.reference, entry.description, int(entry.flags),
        entry.entry_hash, entry.form, entry.lots, None if entry.lot_source is None else int(entry.lot_source),
        None if entry.lot_priority is None else int(entry.lot_priority), entry.lot_expires_at, entry.order_id,
        entry.actor, entry.reverses_seq, entry.unit_type, entry.unit_amount, entry.unit_pico, entry.details,
    )


def hold_from_row(row: Row) -> Hold:
    return Hold(
        user_id=row[0], hold_id=row[1], request_id=row[2], scene=row[3], provider=row[4], model=row[5],
        held_micros=row[6], input_tokens=row[7], max_output_tokens=row[8], asked_output_tokens=row[9],
        price_rule_id=row[10], price_rule_version=row[11], request_fingerprint=row[12], skip_charge=row[13],
        origin=row[14], state=HoldState(row[15]), opened_at=row[16], expires_at=row[17], closed_at=row[18],
        labels=orjson.loads(row[19]) if row[19] else {}, budget_ids=budget_ids_from_text(row[20]),
    )


def hold_to_row(hold: Hold) -> Row:
    return (
        hold.user_id, hold.hold_id, hold.request_id, hold.scene, hold.provider, hold.model, hold.held_micros,
        hold.input_tokens, hold.max_output_tokens, hold.asked_output_tokens, hold.price_rule_id,
        hold.price_rule_version, hold.request_fingerprint, hold.skip_charge, hold.origin, int(hold.state),
        hold.opened_at, hold.expires_at, hold.closed_at,
        orjson.dumps(dict(hold.labels), option=orjson.OPT_SORT_KEYS).decode() if hold.labels else "",
        budget_ids_to_text(hold.budget_ids),
    )


def budget_ids_to_text(ids: tuple[str, ...]) -> str:
    return ",".join(ids)


def budget_ids_from_text(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def lot_from_row(row: Row) -> Lot:
    return Lot(
        user_id=row[0], seq=row[1], source=EntrySource(row[2]), priority=row[3], granted_micros=row[4],
        remaining_micros=row[5], expires_at=row[6], order_id=row[7], granted_at=row[8],
    )


def lot_to_row(lot: Lot) -> Row:
    return (
        lot.user_id, lot.seq, int(lot.source), int(lot.priority), lot.granted_micros, lot.remaining_micros,
        lot.expires_at, lot.order_id, lot.granted_at, lot.remaining_micros > 0,
    )


def _limit_from(count: int | None, period: int | None) -> Limit | None:
    return None if count is None or period is None else Limit(count, Period(period))


def _limit_to(limit: Limit | None) -> tuple[int | None, int | None]:
    return (None, None) if limit is None else (limit.count, int(limit.period))


def product_from_row(row: Row) -> Product:
    values = [*row[:9], ProductStatus(row[9]), *row[10:12], _limit_from(row[12], row[13]), *row[14:16]]
    return Product(*values)


def product_to_row(product: Product) -> Row:
    return (
        product.product_id, product.sku, product.name, product.description, product.credit_micros, product.price_cent,
        product.original_price_cent, product.currency, product.badge, int(product.status), product.sort_order,
        product.validity_days, *_limit_to(product.purchase_limit), product.created_at, product.updated_at,
    )


def product_from_text(text: str) -> Product:
    """A snapshot that an order keeps."""
    row = orjson.loads(text)
    return product_from_row((*row[:14], datetime.fromisoformat(row[14]), datetime.fromisoformat(row[15])))


def product_to_text(product: Product) -> str:
    return orjson.dumps(product_to_row(product)).decode()


def order_from_row(row: Row) -> Order:
    values = [*row[:4], OrderStatus(row[4]), product_from_text(row[5]), *row[6:]]
    return Order(*values)


def order_to_row(order: Order) -> Row:
    return (
        order.user_id, order.order_id, order.order_no, order.idempotency_key, int(order.status),
        product_to_text(order.product), order.quantity, order.credit_micros, order.amount_cent, order.currency,
        order.created_at, order.payment_provider, order.payment_reference, order.paid_at, order.credited_at,
        order.closed_at, order.refunded_at, order.refunded_micros, order.refunded_cent, order.credit_seq,
        order.refund_due, order.steps,
    )


def order_step_from_row(row: Row) -> OrderStep:
    values = [*row[:3], OrderStatus(row[3]), *row[4:]]
    return OrderStep(*values)


def order_step_to_row(step: OrderStep) -> Row:
    return step.user_id, step.order_id, step.number, int(step.status), step.at, step.actor, step.note


def slot_from_row(row: Row) -> Slot:
    return Slot(*row)


def slot_to_row(slot: Slot) -> Row:
    return slot.user_id, slot.subject, slot.period_start, slot.number, slot.holder


def reward_rule_from_row(row: Row) -> RewardRule:
    values = [*row[:5], _limit_from(row[5], row[6]), *row[7:]]
    return RewardRule(*values)


def reward_rule_to_row(rule: RewardRule) -> Row:
    return (
        rule.source, rule.version, rule.name, rule.amount_micros, rule.is_active, *_limit_to(rule.limit),
        rule.validity_days, rule.description, rule.created_at,
    )


def budget_from_row(row: Row) -> Budget:
    values = [*row[:4], Period(row[4]), *row[5:]]
    return Budget(*values)


def budget_to_row(budget: Budget) -> Row:
    return (
        budget.user_id, budget.budget_id, budget.label_key, budget.label_value, int(budget.period),
        budget.limit_micros, budget.spent_micros, budget.held_micros, budget.period_start, budget.created_at,
        budget.updated_at,
    )


def price_rule_from_row(row: Row) -> PriceRule:
    values = dict(zip(PRICE_RULE_FIELDS, row[:22], strict=True))
    values["status"] = PriceRuleStatus(values["status"])
    units = tuple(UnitPrice(*pair) for pair in orjson.loads(row[30]))
    return PriceRule(**values, rates=Rates(*row[22:30]), unit_prices=units)


def price_rule_to_row(rule: PriceRule) -> Row:
    return (
        rule.rule_id, rule.version, rule.scene, rule.provider, rule.model, rule.currency, rule.input_price,
        rule.output_price, rule.cached_input_price, rule.cache_write_price, rule.reasoning_price,
        rule.input_audio_price, rule.output_audio_price, rule.per_call_price, rule.credits_per_currency_unit,
        rule.markup_bps, rule.priority, int(rule.status), rule.valid_from, rule.valid_to, rule.description,
        rule.created_at, *rates_numbers(rule.rates),
        orjson.dumps([(price.unit_type, price.price_micros) for price in rule.unit_prices]).decode(),
    )
