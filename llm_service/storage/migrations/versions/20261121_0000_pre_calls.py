"""Calls, attempts, kept answers, models, the sweeper's cursor and the outbox."""

from alembic import op

from servicekit.outbox import table as outbox

revision = "20261121_0000"
down_revision = None

CALLS = """
CREATE TABLE call (
    user_id text NOT NULL,
    call_id uuid NOT NULL,
    request_id text NOT NULL,
    scene text NOT NULL,
    conversation_id text NOT NULL,
    model text NOT NULL,
    provider text NOT NULL,
    price_provider text NOT NULL,
    upstream_model text NOT NULL,
    state smallint NOT NULL,
    streamed boolean NOT NULL,
    skip_charge boolean NOT NULL,
    labels jsonb NOT NULL,
    hold_micros bigint NOT NULL,
    max_output_tokens integer NOT NULL,
    price_rule_id text NOT NULL,
    price_rule_version integer NOT NULL,
    rates jsonb,
    input_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    input_audio_tokens bigint NOT NULL,
    output_audio_tokens bigint NOT NULL,
    usage_source smallint NOT NULL,
    finish_reason smallint NOT NULL,
    error_reason text NOT NULL,
    credit_micros bigint,
    charge_status smallint,
    swept boolean NOT NULL,
    created_at timestamptz NOT NULL,
    first_token_at timestamptz,
    ended_at timestamptz,
    lease_until timestamptz,
    cancel_asked boolean NOT NULL DEFAULT false,
    PRIMARY KEY (user_id, call_id)
) WITH (fillfactor = 90);
CREATE INDEX call_by_time ON call (user_id, created_at, call_id);
CREATE INDEX call_by_request ON call (user_id, request_id);
CREATE INDEX call_by_id ON call (call_id);
CREATE INDEX call_running ON call (lease_until) WHERE state = 1;

CREATE TABLE attempt (
    user_id text NOT NULL,
    call_id uuid NOT NULL,
    number smallint NOT NULL,
    model_id text NOT NULL,
    provider text NOT NULL,
    upstream_model text NOT NULL,
    error_reason text NOT NULL,
    http_status smallint NOT NULL,
    started_at timestamptz NOT NULL,
    first_token_at timestamptz,
    ended_at timestamptz,
    PRIMARY KEY (user_id, call_id, number)
);

CREATE TABLE call_answer (
    user_id text NOT NULL,
    call_id uuid NOT NULL,
    answer bytea NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, call_id)
);
CREATE INDEX call_answer_by_age ON call_answer (stored_at);

CREATE TABLE model (
    model_id text PRIMARY KEY,
    alias text NOT NULL,
    provider smallint NOT NULL,
    base_url text NOT NULL,
    upstream_model text NOT NULL,
    sealed_key bytea,
    active boolean NOT NULL,
    priority integer NOT NULL,
    weight integer NOT NULL,
    context_window integer NOT NULL,
    max_output_tokens integer NOT NULL,
    timeouts jsonb NOT NULL,
    extra_headers jsonb NOT NULL,
    price_provider text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    idempotency_key text
);
CREATE INDEX model_by_alias ON model (alias, priority, model_id);
CREATE UNIQUE INDEX model_key ON model (idempotency_key);

CREATE TABLE sweep_cursor (
    name text PRIMARY KEY,
    moved_to timestamptz NOT NULL
);

CREATE TABLE registry_revision (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    revision bigint NOT NULL
);
INSERT INTO registry_revision (revision) VALUES (1);
"""


def upgrade() -> None:
    op.execute(CALLS)
    op.execute(outbox.CREATE)
