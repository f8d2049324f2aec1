"""The schema as data. Every key and index of an account's rows starts with user_id, so that accounts can be spread."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)

from servicekit.db.leases import lease_table
from servicekit.kafka.offsets import offset_table
from servicekit.outbox.table import outbox_tables

SCHEMA = "tokenstore"
METADATA = MetaData()

TIME = DateTime(timezone=True)
USAGE_COLUMNS = (
    "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens",
    "input_audio_tokens", "output_audio_tokens",
)
RATE_COLUMNS = (
    "input_pico", "cached_input_pico", "cache_write_pico", "output_pico", "reasoning_pico", "input_audio_pico",
    "output_audio_pico", "per_call_pico",
)


def _bigint(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _words(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


account = Table(
    "account", METADATA,
    Column("user_id", Text, primary_key=True),
    *map(_bigint, (
        "balance_micros", "held_micros", "overdraft_limit_micros", "total_recharged_micros", "total_rewarded_micros",
        "total_consumed_micros", "seq",
    )),
    Column("head_hash", LargeBinary, nullable=False),
    Column("updated_at", TIME, nullable=False),
    *map(_bigint, ("version", "head_lot", "head_lot_micros")),
    Column("next_expiry_at", TIME),
    Column("has_budgets", Boolean, nullable=False),
    Column("low_level", Integer, nullable=False),
)
# The way to the few accounts with credit to expire; it changes with lots, not with charges.
Index(
    "account_next_expiry", account.c.next_expiry_at, account.c.user_id,
    postgresql_where=text("next_expiry_at IS NOT NULL"),
)

ledger_entry = Table(
    "ledger_entry", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    _words("event_id"),
    Column("source", SmallInteger, nullable=False),
    _bigint("amount_micros"),
    _bigint("balance_after_micros"),
    Column("status", SmallInteger, nullable=False),
    Column("occurred_at", TIME, nullable=False),
    Column("booked_at", TIME, nullable=False),
    *map(_words, ("scene", "model", "provider")),
    *(Column(name, BigInteger) for name in USAGE_COLUMNS),
    Column("usage_source", SmallInteger),
    _words("price_rule_id"),
    Column("price_rule_version", Integer, nullable=False),
    *(Column(name, BigInteger) for name in RATE_COLUMNS),
    Column("call_id", Uuid),
    *map(_words, ("request_id", "conversation_id", "reference", "description")),
    Column("flags", Integer, nullable=False),
    Column("entry_hash", LargeBinary, nullable=False),
    Column("form", SmallInteger, nullable=False),
    _words("lots"),
    *(Column(name, SmallInteger) for name in ("lot_source", "lot_priority")),
    Column("lot_expires_at", TIME),
    *map(_words, ("order_id", "actor")),
    Column("reverses_seq", BigInteger),
    *map(_words, ("unit_type", "unit_amount")),
    Column("unit_pico", BigInteger),
    _words("details"),
    UniqueConstraint("user_id", "event_id", name="ledger_entry_event"),
)
Index(
    "ledger_entry_reversal", ledger_entry.c.user_id, ledger_entry.c.reverses_seq, unique=True,
    postgresql_where=text("reverses_seq IS NOT NULL"),
)
Index(
    "ledger_entry_by_order", ledger_entry.c.user_id, ledger_entry.c.order_id, ledger_entry.c.seq,
    postgresql_where=text("order_id <> ''"),
)

lot = Table(
    "lot", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    *(Column(name, SmallInteger, nullable=False) for name in ("source", "priority")),
    *map(_bigint, ("granted_micros", "remaining_micros")),
    Column("expires_at", TIME),
    _words("order_id"),
    Column("granted_at", TIME, nullable=False),
    Column("is_open", Boolean, nullable=False),
)
Index(
    "lot_open", lot.c.user_id, lot.c.priority, lot.c.expires_at, lot.c.seq, postgresql_where=text("is_open")
)

CONSUMPTION_COLUMNS = (
    "calls", "input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens", "micros"
)
consumption_hour = Table(
    "consumption_hour", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("hour", TIME, primary_key=True),
    Column("scene", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    *map(_bigint, CONSUMPTION_COLUMNS),
)

hold = Table(
    "hold", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("hold_id", Uuid, primary_key=True),
    *map(_words, ("request_id", "scene", "provider", "model")),
    *map(_bigint, ("held_micros", "input_tokens", "max_output_tokens", "asked_output_tokens")),
    _words("price_rule_id"),
    Column("price_rule_version", Integer, nullable=False),
    Column("request_fingerprint", LargeBinary, nullable=False),
    Column("skip_charge", Boolean, nullable=False),
    _words("origin"),
    Column("state", SmallInteger, nullable=False),
    Column("opened_at", TIME, nullable=False),
    Column("expires_at", TIME, nullable=False),
    Column("closed_at", TIME),
    *map(_words, ("labels", "budget_ids")),
)
Index("hold_by_request", hold.c.user_id, hold.c.request_id, postgresql_where=text("request_id <> ''"))
# The sweeper's and the auditors' way to few rows among many; partial, so that settled holds cost nothing.
Index("hold_open", hold.c.expires_at, postgresql_where=text("state = 1"))
Index("hold_expired", hold.c.closed_at, hold.c.hold_id, postgresql_where=text("state = 4"))

price_rule = Table(
    "price_rule", METADATA,
    Column("rule_id", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    *map(_words, ("scene", "provider", "model", "currency")),
    *map(_bigint, ("input_price", "output_price")),
    *(
        Column(name, BigInteger)
        for name in (
            "cached_input_price", "cache_write_price", "reasoning_price", "input_audio_price", "output_audio_price"
        )
    ),
    *map(_bigint, ("per_call_price", "credits_per_currency_unit")),
    Column("markup_bps", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("valid_from", TIME),
    Column("valid_to", TIME),
    _words("description"),
    Column("created_at", TIME, nullable=False),
    *map(_bigint, RATE_COLUMNS),
    Column("idempotency_key", Text, nullable=False),
    _words("unit_prices"),
    UniqueConstraint("idempotency_key", name="price_rule_key"),
)

product = Table(
    "product", METADATA,
    Column("product_id", Text, primary_key=True),
    *map(_words, ("sku", "name", "description")),
    *map(_bigint, ("credit_micros", "price_cent", "original_price_cent")),
    *map(_words, ("currency", "badge")),
    Column("status", SmallInteger, nullable=False),
    *(Column(name, Integer, nullable=False) for name in ("sort_order", "validity_days")),
    Column("limit_count", Integer),
    Column("limit_period", SmallInteger),
    *(Column(name, TIME, nullable=False) for name in ("created_at", "updated_at")),
    _words("idempotency_key"),
    UniqueConstraint("sku", name="product_sku"),
    UniqueConstraint("idempotency_key", name="product_key"),
)

credit_order = Table(
    "credit_order", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("order_id", Uuid, primary_key=True),
    *map(_words, ("order_no", "idempotency_key")),
    Column("status", SmallInteger, nullable=False),
    _words("product"),
    Column("quantity", Integer, nullable=False),
    *map(_bigint, ("credit_micros", "amount_cent")),
    _words("currency"),
    Column("created_at", TIME, nullable=False),
    *map(_words, ("payment_provider", "payment_reference")),
    *(Column(name, TIME) for name in ("paid_at", "credited_at", "closed_at", "refunded_at")),
    *map(_bigint, ("refunded_micros", "refunded_cent", "credit_seq")),
    Column("refund_due", Boolean, nullable=False),
    Column("steps", Integer, nullable=False),
    UniqueConstraint("user_id", "idempotency_key", name="credit_order_key"),
)
# A provider's callback knows the order, not the user; sweeper and operators look for few among many.
Index("credit_order_by_id", credit_order.c.order_id)
Index(
    "credit_order_pending", credit_order.c.created_at, credit_order.c.order_id, postgresql_where=text("status = 1")
)
Index("credit_order_refund_due", credit_order.c.order_id, postgresql_where=text("refund_due"))

order_step = Table(
    "order_step", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("order_id", Uuid, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("status", SmallInteger, nullable=False),
    Column("at", TIME, nullable=False),
    *map(_words, ("actor", "note")),
)

limit_slot = Table(
    "limit_slot", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("period_start", TIME, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    _words("holder"),
)
Index("limit_slot_by_holder", limit_slot.c.user_id, limit_slot.c.holder)

reward_rule = Table(
    "reward_rule", METADATA,
    Column("source", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    _words("name"),
    _bigint("amount_micros"),
    Column("is_active", Boolean, nullable=False),
    Column("limit_count", Integer),
    Column("limit_period", SmallInteger),
    Column("validity_days", Integer, nullable=False),
    _words("description"),
    Column("created_at", TIME, nullable=False),
    _words("idempotency_key"),
    UniqueConstraint("idempotency_key", name="reward_rule_key"),
)

budget = Table(
    "budget", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("budget_id", Text, primary_key=True),
    *map(_words, ("label_key", "label_value")),
    Column("period", SmallInteger, nullable=False),
    *map(_bigint, ("limit_micros", "spent_micros", "held_micros")),
    *(Column(name, TIME, nullable=False) for name in ("period_start", "created_at", "updated_at")),
    UniqueConstraint("user_id", "label_key", "label_value", "period", name="budget_once"),
)

charge_issue = Table(
    "charge_issue", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("issue_id", BigInteger, Identity(always=True), primary_key=True),
    *map(_words, ("event_id", "kind", "detail")),
    Column("original", LargeBinary, nullable=False),
    Column("noticed_at", TIME, nullable=False),
    _bigint("seq"),
    Column("state", SmallInteger, nullable=False),
    *map(_words, ("content_type", "origin", "fingerprint")),
    Column("resolved_at", TIME),
    *map(_words, ("resolved_by", "note")),
)
Index(
    "charge_issue_once", charge_issue.c.user_id, charge_issue.c.event_id, charge_issue.c.kind,
    charge_issue.c.fingerprint, unique=True,
)
Index("charge_issue_open", charge_issue.c.issue_id, postgresql_where=text("state = 1"))

offset_table(METADATA)
outbox_tables(METADATA)
lease_table(METADATA)
