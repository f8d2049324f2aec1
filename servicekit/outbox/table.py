"""The outbox's tables, in the schema of the service whose state they go with, and the SQL on them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Identity, Index, LargeBinary, MetaData, SmallInteger, Table, Text
from sqlalchemy import text as sql

from servicekit.outbox.message import LANES

CREATE = f"""
CREATE TABLE outbox_message (
    message_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lane smallint NOT NULL,
    key text NOT NULL,
    event_id text NOT NULL,
    event_type text NOT NULL,
    topic text NOT NULL,
    payload bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX outbox_message_by_lane ON outbox_message (lane, message_id);
CREATE TABLE outbox_lane (
    lane smallint PRIMARY KEY,
    owner text NOT NULL DEFAULT '',
    lease_until timestamptz NOT NULL DEFAULT 'epoch'
);
INSERT INTO outbox_lane (lane) SELECT generate_series(0, {LANES - 1});
CREATE TABLE outbox_relay (
    owner text PRIMARY KEY,
    seen_until timestamptz NOT NULL
);
"""


ADD_TRACEPARENT = "ALTER TABLE outbox_message ADD COLUMN traceparent text NOT NULL DEFAULT ''"


def outbox_tables(metadata: MetaData) -> None:
    """Adds the tables to a service's metadata, for the migration drift test."""
    message = Table(
        "outbox_message", metadata,
        Column("message_id", BigInteger, Identity(always=True), primary_key=True),
        Column("lane", SmallInteger, nullable=False),
        Column("key", Text, nullable=False),
        Column("event_id", Text, nullable=False),
        Column("event_type", Text, nullable=False),
        Column("topic", Text, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=sql("now()")),
        Column("traceparent", Text, nullable=False, server_default=""),
    )
    Index("outbox_message_by_lane", message.c.lane, message.c.message_id)
    Table(
        "outbox_lane", metadata,
        Column("lane", SmallInteger, primary_key=True, autoincrement=False),
        Column("owner", Text, nullable=False, server_default=""),
        Column("lease_until", DateTime(timezone=True), nullable=False, server_default=sql("'epoch'")),
    )
    Table(
        "outbox_relay", metadata,
        Column("owner", Text, primary_key=True),
        Column("seen_until", DateTime(timezone=True), nullable=False),
    )


ANNOUNCE = """
INSERT INTO outbox_relay (owner, seen_until) VALUES (%(owner)s, now() + %(lease)s)
ON CONFLICT (owner) DO UPDATE SET seen_until = excluded.seen_until
"""
COUNT_RELAYS = "SELECT count(*) FROM outbox_relay WHERE seen_until > now()"
FORGET_RELAYS = "DELETE FROM outbox_relay WHERE seen_until < now() - interval '1 hour' OR owner = %(leaving)s"
# SKIP LOCKED: two relays that claim at once share what is free instead of waiting for each other.
CLAIM_LANES = """
UPDATE outbox_lane SET owner = %(owner)s, lease_until = now() + %(lease)s
WHERE lane IN (
    SELECT lane FROM outbox_lane WHERE owner = %(owner)s OR lease_until <= now()
    ORDER BY (owner = %(owner)s) DESC, lane LIMIT %(most)s FOR UPDATE SKIP LOCKED
) RETURNING lane
"""
RELEASE_LANES = """
UPDATE outbox_lane SET lease_until = 'epoch', owner = '' WHERE owner = %(owner)s AND NOT lane = ANY(%(keep)s)
"""
READ_MESSAGES = """
SELECT message_id, key, event_id, event_type, topic, payload, created_at, traceparent FROM outbox_message
WHERE lane = ANY(%(lanes)s) AND NOT key = ANY(%(blocked)s) ORDER BY message_id LIMIT %(most)s
"""
DELETE_MESSAGES = "DELETE FROM outbox_message WHERE message_id = ANY(%(ids)s)"
# Used inside the statement that commits the state; see each service's storage.
INSERT_COLUMNS = "lane, key, event_id, event_type, topic, payload"
