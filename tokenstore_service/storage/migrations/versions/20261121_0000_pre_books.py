"""The books: accounts, entries, holds, price rules, issues, consumer offsets; and the one price rule to begin with."""

from alembic import op

from servicekit.kafka import offsets

revision = "20261121_0000"
down_revision = None

BOOKS = """
CREATE TABLE account (
    user_id text PRIMARY KEY,
    balance_micros bigint NOT NULL,
    held_micros bigint NOT NULL CHECK (held_micros >= 0),
    overdraft_limit_micros bigint NOT NULL CHECK (overdraft_limit_micros >= 0),
    total_recharged_micros bigint NOT NULL,
    total_rewarded_micros bigint NOT NULL,
    total_consumed_micros bigint NOT NULL,
    seq bigint NOT NULL CHECK (seq >= 0),
    head_hash bytea NOT NULL,
    updated_at timestamptz NOT NULL
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02);

CREATE TABLE ledger_entry (
    user_id text NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    event_id text NOT NULL,
    source smallint NOT NULL,
    amount_micros bigint NOT NULL,
    balance_after_micros bigint NOT NULL,
    status smallint NOT NULL,
    occurred_at timestamptz NOT NULL,
    booked_at timestamptz NOT NULL,
    scene text NOT NULL,
    model text NOT NULL,
    provider text NOT NULL,
    input_tokens bigint,
    cached_input_tokens bigint,
    cache_write_tokens bigint,
    output_tokens bigint,
    reasoning_tokens bigint,
    input_audio_tokens bigint,
    output_audio_tokens bigint,
    usage_source smallint,
    price_rule_id text NOT NULL,
    price_rule_version integer NOT NULL,
    input_pico bigint,
    cached_input_pico bigint,
    cache_write_pico bigint,
    output_pico bigint,
    reasoning_pico bigint,
    input_audio_pico bigint,
    output_audio_pico bigint,
    per_call_pico bigint,
    call_id uuid,
    request_id text NOT NULL,
    conversation_id text NOT NULL,
    reference text NOT NULL,
    description text NOT NULL,
    flags integer NOT NULL,
    entry_hash bytea NOT NULL,
    PRIMARY KEY (user_id, seq),
    CONSTRAINT ledger_entry_event UNIQUE (user_id, event_id)
);

CREATE TABLE hold (
    user_id text NOT NULL,
    hold_id uuid NOT NULL,
    request_id text NOT NULL,
    scene text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    held_micros bigint NOT NULL CHECK (held_micros >= 0),
    input_tokens bigint NOT NULL,
    max_output_tokens bigint NOT NULL,
    asked_output_tokens bigint NOT NULL,
    price_rule_id text NOT NULL,
    price_rule_version integer NOT NULL,
    request_fingerprint bytea NOT NULL,
    skip_charge boolean NOT NULL,
    origin text NOT NULL,
    state smallint NOT NULL,
    opened_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    closed_at timestamptz,
    PRIMARY KEY (user_id, hold_id)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX hold_by_request ON hold (user_id, request_id) WHERE request_id <> '';
CREATE INDEX hold_open ON hold (expires_at) WHERE state = 1;
CREATE INDEX hold_expired ON hold (closed_at, hold_id) WHERE state = 4;

CREATE TABLE price_rule (
    rule_id text NOT NULL,
    version integer NOT NULL CHECK (version > 0),
    scene text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    currency text NOT NULL,
    input_price bigint NOT NULL,
    output_price bigint NOT NULL,
    cached_input_price bigint,
    cache_write_price bigint,
    reasoning_price bigint,
    input_audio_price bigint,
    output_audio_price bigint,
    per_call_price bigint NOT NULL,
    credits_per_currency_unit bigint NOT NULL,
    markup_bps integer NOT NULL,
    priority integer NOT NULL,
    status smallint NOT NULL,
    valid_from timestamptz,
    valid_to timestamptz,
    description text NOT NULL,
    created_at timestamptz NOT NULL,
    input_pico bigint NOT NULL,
    cached_input_pico bigint NOT NULL,
    cache_write_pico bigint NOT NULL,
    output_pico bigint NOT NULL,
    reasoning_pico bigint NOT NULL,
    input_audio_pico bigint NOT NULL,
    output_audio_pico bigint NOT NULL,
    per_call_pico bigint NOT NULL,
    idempotency_key text NOT NULL,
    PRIMARY KEY (rule_id, version),
    CONSTRAINT price_rule_key UNIQUE (idempotency_key)
);

CREATE TABLE charge_issue (
    user_id text NOT NULL,
    issue_id bigint GENERATED ALWAYS AS IDENTITY,
    event_id text NOT NULL,
    kind text NOT NULL,
    detail text NOT NULL,
    original bytea NOT NULL,
    noticed_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, issue_id)
);
"""

# Per million tokens: input 3.2, output 16, cached 0.8, reasoning 16 CNY; 100 credits per CNY.
SEED = """
INSERT INTO price_rule VALUES (
    'default', 1, '*', '*', '*', 'CNY', 3200000, 16000000, 800000, NULL, 16000000, NULL, NULL, 0, 100, 0, 0, 1, NULL,
    NULL, 'everything, until a more specific rule is made', 'epoch', 320000000, 80000000, 320000000, 1600000000,
    1600000000, 320000000, 1600000000, 0, 'seed:default'
);
"""


def upgrade() -> None:
    op.execute(BOOKS)
    op.execute(offsets.CREATE)
    op.execute(SEED)
