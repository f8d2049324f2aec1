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

from servicekit.kafka.offsets import offset_table

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
    UniqueConstraint("user_id", "event_id", name="ledger_entry_event"),
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
    UniqueConstraint("idempotency_key", name="price_rule_key"),
)

charge_issue = Table(
    "charge_issue", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("issue_id", BigInteger, Identity(always=True), primary_key=True),
    *map(_words, ("event_id", "kind", "detail")),
    Column("original", LargeBinary, nullable=False),
    Column("noticed_at", TIME, nullable=False),
)

offset_table(METADATA)
