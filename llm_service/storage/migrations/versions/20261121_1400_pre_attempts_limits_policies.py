"""Attempts with their tokens, models with limits and quirks, policies of users, traces; kept answers are sealed from
now on, and those that are not are deleted."""

from alembic import op

from servicekit.outbox import table as outbox

revision = "20261121_1400"
down_revision = "20261121_0000"

STATEMENTS = (
    outbox.ADD_TRACEPARENT,
    "ALTER TABLE call ADD COLUMN operation smallint NOT NULL DEFAULT 1",
    """
    ALTER TABLE attempt
        ADD COLUMN kind smallint NOT NULL DEFAULT 1,
        ADD COLUMN usage jsonb,
        ADD COLUMN charged boolean NOT NULL DEFAULT false,
        ADD COLUMN upstream_finish_reason text NOT NULL DEFAULT ''
    """,
    """
    ALTER TABLE model
        ADD COLUMN limits jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN capabilities jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN default_params jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN quirks jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN hedge_after double precision,
        ADD COLUMN max_retries smallint NOT NULL DEFAULT 2,
        ADD COLUMN bills_failed_attempts boolean NOT NULL DEFAULT false,
        ADD COLUMN tokenizer text NOT NULL DEFAULT ''
    """,
    """
    CREATE TABLE user_policy (
        user_id text PRIMARY KEY,
        limits jsonb,
        keep_no_answers boolean NOT NULL,
        updated_at timestamptz NOT NULL
    )
    """,
    "DELETE FROM call_answer",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
