"""Lots, sums by hour, products, orders, rewards, budgets, issues with states, the outbox.

Stop every replica of the version before: it would go on writing entries that use no lots.
"""

from alembic import op

from servicekit.db import leases
from servicekit.outbox import table as outbox

revision = "20261121_1200"
down_revision = "20261121_0000"

COLUMNS = """
ALTER TABLE account
    ADD COLUMN version bigint NOT NULL DEFAULT 0,
    ADD COLUMN head_lot bigint NOT NULL DEFAULT 0,
    ADD COLUMN head_lot_micros bigint NOT NULL DEFAULT 0 CHECK (head_lot_micros >= 0),
    ADD COLUMN next_expiry_at timestamptz,
    ADD COLUMN has_budgets boolean NOT NULL DEFAULT false,
    ADD COLUMN low_level integer NOT NULL DEFAULT 0;
CREATE INDEX account_next_expiry ON account (next_expiry_at, user_id) WHERE next_expiry_at IS NOT NULL;

ALTER TABLE ledger_entry
    ADD COLUMN form smallint NOT NULL DEFAULT 1,
    ADD COLUMN lots text NOT NULL DEFAULT '',
    ADD COLUMN lot_source smallint,
    ADD COLUMN lot_priority smallint,
    ADD COLUMN lot_expires_at timestamptz,
    ADD COLUMN order_id text NOT NULL DEFAULT '',
    ADD COLUMN actor text NOT NULL DEFAULT '',
    ADD COLUMN reverses_seq bigint,
    ADD COLUMN unit_type text NOT NULL DEFAULT '',
    ADD COLUMN unit_amount text NOT NULL DEFAULT '',
    ADD COLUMN unit_pico bigint,
    ADD COLUMN details text NOT NULL DEFAULT '';
CREATE UNIQUE INDEX ledger_entry_reversal ON ledger_entry (user_id, reverses_seq) WHERE reverses_seq IS NOT NULL;
CREATE INDEX ledger_entry_by_order ON ledger_entry (user_id, order_id, seq) WHERE order_id <> '';

ALTER TABLE hold
    ADD COLUMN labels text NOT NULL DEFAULT '',
    ADD COLUMN budget_ids text NOT NULL DEFAULT '';

ALTER TABLE price_rule ADD COLUMN unit_prices text NOT NULL DEFAULT '[]';

ALTER TABLE charge_issue
    ADD COLUMN seq bigint NOT NULL DEFAULT 0,
    ADD COLUMN state smallint NOT NULL DEFAULT 1,
    ADD COLUMN content_type text NOT NULL DEFAULT 'creditmesh.events.v1.ChargeRequested',
    ADD COLUMN origin text NOT NULL DEFAULT '',
    ADD COLUMN fingerprint text NOT NULL DEFAULT '',
    ADD COLUMN resolved_at timestamptz,
    ADD COLUMN resolved_by text NOT NULL DEFAULT '',
    ADD COLUMN note text NOT NULL DEFAULT '';
UPDATE charge_issue SET fingerprint = issue_id::text;
CREATE UNIQUE INDEX charge_issue_once ON charge_issue (user_id, event_id, kind, fingerprint);
CREATE INDEX charge_issue_open ON charge_issue (issue_id) WHERE state = 1;
"""

TABLES = """
CREATE TABLE lot (
    user_id text NOT NULL,
    seq bigint NOT NULL,
    source smallint NOT NULL,
    priority smallint NOT NULL,
    granted_micros bigint NOT NULL CHECK (granted_micros > 0),
    remaining_micros bigint NOT NULL CHECK (remaining_micros >= 0),
    expires_at timestamptz,
    order_id text NOT NULL,
    granted_at timestamptz NOT NULL,
    is_open boolean NOT NULL,
    PRIMARY KEY (user_id, seq)
) WITH (fillfactor = 80);
CREATE INDEX lot_open ON lot (user_id, priority, expires_at, seq) WHERE is_open;

CREATE TABLE consumption_hour (
    user_id text NOT NULL,
    hour timestamptz NOT NULL,
    scene text NOT NULL,
    model text NOT NULL,
    calls bigint NOT NULL,
    input_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    micros bigint NOT NULL,
    PRIMARY KEY (user_id, hour, scene, model)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE product (
    product_id text PRIMARY KEY,
    sku text NOT NULL,
    name text NOT NULL,
    description text NOT NULL,
    credit_micros bigint NOT NULL CHECK (credit_micros > 0),
    price_cent bigint NOT NULL CHECK (price_cent >= 0),
    original_price_cent bigint NOT NULL,
    currency text NOT NULL,
    badge text NOT NULL,
    status smallint NOT NULL,
    sort_order integer NOT NULL,
    validity_days integer NOT NULL,
    limit_count integer,
    limit_period smallint,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    idempotency_key text NOT NULL,
    CONSTRAINT product_sku UNIQUE (sku),
    CONSTRAINT product_key UNIQUE (idempotency_key)
);

CREATE TABLE credit_order (
    user_id text NOT NULL,
    order_id uuid NOT NULL,
    order_no text NOT NULL,
    idempotency_key text NOT NULL,
    status smallint NOT NULL,
    product text NOT NULL,
    quantity integer NOT NULL CHECK (quantity > 0),
    credit_micros bigint NOT NULL,
    amount_cent bigint NOT NULL,
    currency text NOT NULL,
    created_at timestamptz NOT NULL,
    payment_provider text NOT NULL,
    payment_reference text NOT NULL,
    paid_at timestamptz,
    credited_at timestamptz,
    closed_at timestamptz,
    refunded_at timestamptz,
    refunded_micros bigint NOT NULL CHECK (refunded_micros BETWEEN 0 AND credit_micros),
    refunded_cent bigint NOT NULL CHECK (refunded_cent BETWEEN 0 AND amount_cent),
    credit_seq bigint NOT NULL,
    refund_due boolean NOT NULL,
    steps integer NOT NULL,
    PRIMARY KEY (user_id, order_id),
    CONSTRAINT credit_order_key UNIQUE (user_id, idempotency_key)
);
CREATE INDEX credit_order_by_id ON credit_order (order_id);
CREATE INDEX credit_order_pending ON credit_order (created_at, order_id) WHERE status = 1;
CREATE INDEX credit_order_refund_due ON credit_order (order_id) WHERE refund_due;

CREATE TABLE order_step (
    user_id text NOT NULL,
    order_id uuid NOT NULL,
    number integer NOT NULL,
    status smallint NOT NULL,
    at timestamptz NOT NULL,
    actor text NOT NULL,
    note text NOT NULL,
    PRIMARY KEY (user_id, order_id, number)
);

CREATE TABLE limit_slot (
    user_id text NOT NULL,
    subject text NOT NULL,
    period_start timestamptz NOT NULL,
    number integer NOT NULL,
    holder text NOT NULL,
    PRIMARY KEY (user_id, subject, period_start, number)
);
CREATE INDEX limit_slot_by_holder ON limit_slot (user_id, holder);

CREATE TABLE reward_rule (
    source text NOT NULL,
    version integer NOT NULL CHECK (version > 0),
    name text NOT NULL,
    amount_micros bigint NOT NULL CHECK (amount_micros >= 0),
    is_active boolean NOT NULL,
    limit_count integer,
    limit_period smallint,
    validity_days integer NOT NULL,
    description text NOT NULL,
    created_at timestamptz NOT NULL,
    idempotency_key text NOT NULL,
    PRIMARY KEY (source, version),
    CONSTRAINT reward_rule_key UNIQUE (idempotency_key)
);

CREATE TABLE budget (
    user_id text NOT NULL,
    budget_id text NOT NULL,
    label_key text NOT NULL,
    label_value text NOT NULL,
    period smallint NOT NULL,
    limit_micros bigint NOT NULL CHECK (limit_micros >= 0),
    spent_micros bigint NOT NULL,
    held_micros bigint NOT NULL CHECK (held_micros >= 0),
    period_start timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, budget_id),
    CONSTRAINT budget_once UNIQUE (user_id, label_key, label_value, period)
);
"""

# What was there before becomes one lot for each account, and sums by hour.
CARRIED_OVER = """
INSERT INTO lot SELECT user_id, seq, 4, 20, balance_micros, balance_micros, NULL, '', updated_at, true
    FROM account WHERE balance_micros > 0;
UPDATE account SET version = seq, head_lot = CASE WHEN balance_micros > 0 THEN seq ELSE 0 END,
    head_lot_micros = greatest(balance_micros, 0);
INSERT INTO consumption_hour
    SELECT user_id, date_trunc('hour', occurred_at, 'UTC'), scene, model, count(*), coalesce(sum(input_tokens), 0),
        coalesce(sum(cached_input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(reasoning_tokens), 0),
        -sum(amount_micros)
    FROM ledger_entry WHERE source = 2 GROUP BY 1, 2, 3, 4;
"""

# Inserted here once, never overwritten afterwards.
SEEDS = """
INSERT INTO product VALUES
    ('free_100', 'free_100', 'Free', '100 credits a day', 100000000, 0, 0, 'CNY', '', 1, 10, 0, 1, 1,
        now(), now(), 'seed:free_100'),
    ('starter_1000', 'starter_1000', 'Starter', '1 000 credits for 31 days', 1000000000, 990, 990, 'CNY', '', 1, 20, 31,
        NULL, NULL, now(), now(), 'seed:starter_1000'),
    ('lite_3000', 'lite_3000', 'Lite', '3 000 credits for 31 days', 3000000000, 1990, 1990, 'CNY', '', 1, 30, 31,
        NULL, NULL, now(), now(), 'seed:lite_3000'),
    ('pro_10000', 'pro_10000', 'Pro', '10 000 credits for 31 days', 10000000000, 3990, 3990, 'CNY', '', 1, 40, 31,
        NULL, NULL, now(), now(), 'seed:pro_10000'),
    ('max_40000', 'max_40000', 'Max', '40 000 credits for 31 days', 40000000000, 9990, 9990, 'CNY', '', 1, 50, 31,
        NULL, NULL, now(), now(), 'seed:max_40000');
INSERT INTO reward_rule VALUES
    ('forum_like', 1, 'Post liked', 1000000, true, NULL, NULL, 0, '', now(), 'seed:forum_like'),
    ('forum_import', 1, 'Post imported', 5000000, true, NULL, NULL, 0, '', now(), 'seed:forum_import');
"""


def upgrade() -> None:
    op.execute(COLUMNS)
    op.execute(TABLES)
    op.execute(CARRIED_OVER)
    op.execute(SEEDS)
    op.execute(outbox.CREATE)
    op.execute(leases.CREATE)
