"""Conversations, their branches and messages, what they took, and what is done for them in the background."""

from alembic import op

revision = "20261121_2000"
down_revision = "20261121_1400"

STATEMENTS = (
    """
    CREATE TABLE conversation (
        user_id text NOT NULL,
        conversation_id uuid NOT NULL,
        title text NOT NULL,
        system_prompt bytea NOT NULL,
        model text NOT NULL,
        use_memories boolean NOT NULL,
        compact_history boolean NOT NULL,
        status smallint NOT NULL,
        branch integer NOT NULL,
        length integer NOT NULL,
        branches integer NOT NULL,
        head_message_id uuid,
        message_count bigint NOT NULL,
        tokens_total bigint NOT NULL,
        credit_micros_total bigint NOT NULL,
        summary bytea,
        summary_branch integer NOT NULL,
        summary_until integer NOT NULL,
        running_call_id uuid,
        running_message_id uuid,
        running_request_id text,
        running_branch integer,
        running_first integer,
        running_last integer,
        running_until timestamptz,
        created_at timestamptz NOT NULL,
        last_message_at timestamptz NOT NULL,
        deleted_at timestamptz,
        idempotency_key text,
        idempotency_hash bytea,
        PRIMARY KEY (user_id, conversation_id)
    ) WITH (fillfactor = 80)
    """,
    """
    CREATE INDEX conversation_by_use ON conversation (user_id, last_message_at, conversation_id)
    WHERE deleted_at IS NULL
    """,
    "CREATE UNIQUE INDEX conversation_key ON conversation (user_id, idempotency_key)",
    """
    CREATE TABLE branch (
        user_id text NOT NULL,
        conversation_id uuid NOT NULL,
        number integer NOT NULL,
        parent integer NOT NULL,
        forked_at integer NOT NULL,
        PRIMARY KEY (user_id, conversation_id, number)
    )
    """,
    """
    CREATE TABLE message (
        user_id text NOT NULL,
        conversation_id uuid NOT NULL,
        branch integer NOT NULL,
        position integer NOT NULL,
        message_id uuid NOT NULL,
        parent_message_id uuid,
        role smallint NOT NULL,
        state smallint NOT NULL,
        content bytea NOT NULL,
        prompt_tokens integer NOT NULL,
        token_family text NOT NULL,
        tokens_consumed bigint NOT NULL,
        credit_micros bigint NOT NULL,
        call_id uuid,
        request_id text NOT NULL,
        request_hash bytea,
        finish_reason smallint NOT NULL,
        memory_ids jsonb NOT NULL,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, conversation_id, branch, position)
    )
    """,
    "CREATE UNIQUE INDEX message_by_id ON message (user_id, conversation_id, message_id)",
    """
    CREATE UNIQUE INDEX message_by_request ON message (user_id, conversation_id, request_id)
    WHERE call_id IS NOT NULL
    """,
    """
    CREATE TABLE user_total (
        user_id text PRIMARY KEY,
        tokens_total bigint NOT NULL,
        credit_micros_total bigint NOT NULL
    )
    """,
    """
    CREATE TABLE conversation_task (
        user_id text NOT NULL,
        conversation_id uuid NOT NULL,
        kind smallint NOT NULL,
        branch integer NOT NULL,
        until integer NOT NULL,
        tries integer NOT NULL,
        due_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, conversation_id, kind)
    )
    """,
    "CREATE INDEX conversation_task_due ON conversation_task (due_at)",
    "CREATE INDEX call_by_conversation ON call (user_id, conversation_id) WHERE conversation_id <> ''",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
