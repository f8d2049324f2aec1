"""Items and their history, decisions, jobs, model answers, settings."""

from alembic import op

from servicekit.kafka import offsets

revision = "20261121_2100"
down_revision = None

STATEMENTS = (
    "CREATE EXTENSION IF NOT EXISTS vector",
    """
    CREATE TABLE item (
        user_id text NOT NULL,
        item_id uuid NOT NULL,
        type smallint NOT NULL,
        title text NOT NULL,
        content text NOT NULL,
        digest text NOT NULL,
        confidence double precision NOT NULL,
        importance double precision NOT NULL,
        sensitivity smallint NOT NULL,
        is_explicit boolean NOT NULL,
        status smallint NOT NULL,
        version bigint NOT NULL,
        valid_from timestamptz NOT NULL,
        valid_to timestamptz,
        expires_at timestamptz,
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        superseded_by uuid,
        conversation_id text NOT NULL,
        message_id text NOT NULL,
        job_id uuid,
        confirmations integer NOT NULL,
        embedder text NOT NULL,
        embedding vector,
        idempotency_key text,
        PRIMARY KEY (user_id, item_id)
    )
    """,
    "CREATE UNIQUE INDEX item_active_once ON item (user_id, type, digest) WHERE status = 1",
    "CREATE UNIQUE INDEX item_key ON item (user_id, idempotency_key)",
    "CREATE INDEX item_expiry ON item (expires_at) WHERE status = 1",
    """
    CREATE TABLE item_version (
        user_id text NOT NULL,
        item_id uuid NOT NULL,
        version bigint NOT NULL,
        operation text NOT NULL,
        actor text NOT NULL,
        decision_id uuid,
        snapshot jsonb NOT NULL,
        recorded_at timestamptz NOT NULL,
        closed_at timestamptz,
        PRIMARY KEY (user_id, item_id, version)
    )
    """,
    "CREATE INDEX item_version_by_time ON item_version (user_id, recorded_at)",
    "CREATE TABLE user_head (user_id text PRIMARY KEY, revision bigint NOT NULL)",
    """
    CREATE TABLE decision (
        user_id text NOT NULL,
        job_id uuid NOT NULL,
        number integer NOT NULL,
        decision_id uuid NOT NULL,
        fact jsonb NOT NULL,
        action smallint NOT NULL,
        reason text NOT NULL,
        verdicts jsonb NOT NULL,
        items uuid[] NOT NULL,
        policy text NOT NULL,
        recall text NOT NULL,
        prompts text NOT NULL,
        decided_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, job_id, number)
    )
    """,
    "CREATE UNIQUE INDEX decision_by_id ON decision (user_id, decision_id)",
    """
    CREATE TABLE job (
        user_id text NOT NULL,
        job_id uuid NOT NULL,
        conversation_id text NOT NULL,
        message_id text NOT NULL,
        state smallint NOT NULL,
        tries integer NOT NULL,
        reason text NOT NULL,
        turn jsonb,
        occurred_at timestamptz NOT NULL,
        created_at timestamptz NOT NULL,
        due_at timestamptz,
        ended_at timestamptz,
        owner text NOT NULL,
        generation integer NOT NULL,
        calls integer NOT NULL,
        tokens bigint NOT NULL,
        credit_micros bigint NOT NULL,
        PRIMARY KEY (user_id, job_id)
    )
    """,
    "CREATE UNIQUE INDEX job_by_turn ON job (user_id, message_id)",
    "CREATE INDEX job_by_id ON job (job_id)",
    "CREATE INDEX job_open ON job (user_id) WHERE due_at IS NOT NULL",
    "CREATE INDEX job_due ON job (due_at) WHERE due_at IS NOT NULL",
    """
    CREATE TABLE model_answer (
        user_id text NOT NULL,
        call_key text NOT NULL,
        job_id uuid NOT NULL,
        stage text NOT NULL,
        answer text NOT NULL,
        tokens bigint NOT NULL,
        credit_micros bigint NOT NULL,
        call_id text NOT NULL,
        answered_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, call_key)
    )
    """,
    "CREATE INDEX model_answer_by_age ON model_answer (answered_at)",
    """
    CREATE TABLE user_settings (
        user_id text PRIMARY KEY,
        memory_enabled boolean NOT NULL,
        implicit_enabled boolean NOT NULL,
        sensitive_enabled boolean NOT NULL
    )
    """,
    "CREATE TABLE erased_user (user_hash bytea PRIMARY KEY, erased_at timestamptz NOT NULL)",
    offsets.CREATE,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
