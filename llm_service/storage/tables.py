"""The schema as data. Calls are keyed by user_id first, as everything that can be spread."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from servicekit.outbox.table import outbox_tables

SCHEMA = "llm"
METADATA = MetaData()
TIME = DateTime(timezone=True)

USAGE_COLUMNS = (
    "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens",
    "input_audio_tokens", "output_audio_tokens",
)


def _words(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


call = Table(
    "call", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("call_id", Uuid, primary_key=True),
    *map(_words, ("request_id", "scene", "conversation_id", "model", "provider", "price_provider", "upstream_model")),
    Column("state", SmallInteger, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("skip_charge", Boolean, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("hold_micros", BigInteger, nullable=False),
    Column("max_output_tokens", Integer, nullable=False),
    _words("price_rule_id"),
    Column("price_rule_version", Integer, nullable=False),
    Column("rates", JSONB),
    *(Column(name, BigInteger, nullable=False) for name in USAGE_COLUMNS),
    Column("usage_source", SmallInteger, nullable=False),
    Column("finish_reason", SmallInteger, nullable=False),
    _words("error_reason"),
    Column("credit_micros", BigInteger),
    Column("charge_status", SmallInteger),
    Column("swept", Boolean, nullable=False),
    Column("created_at", TIME, nullable=False),
    Column("first_token_at", TIME),
    Column("ended_at", TIME),
    Column("lease_until", TIME),
    Column("cancel_asked", Boolean, nullable=False, server_default=text("false")),
    Column("operation", SmallInteger, nullable=False, server_default=text("1")),
)
Index("call_by_time", call.c.user_id, call.c.created_at, call.c.call_id)
Index("call_by_conversation", call.c.user_id, call.c.conversation_id, postgresql_where=call.c.conversation_id != "")
Index("call_by_request", call.c.user_id, call.c.request_id)
# Two ways in without a user: by the id alone, and the sweeper's to the few that run.
Index("call_by_id", call.c.call_id)
Index("call_running", call.c.lease_until, postgresql_where=text("state = 1"))

attempt = Table(
    "attempt", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("call_id", Uuid, primary_key=True),
    Column("number", SmallInteger, primary_key=True, autoincrement=False),
    *map(_words, ("model_id", "provider", "upstream_model", "error_reason")),
    Column("http_status", SmallInteger, nullable=False),
    Column("started_at", TIME, nullable=False),
    Column("first_token_at", TIME),
    Column("ended_at", TIME),
    Column("kind", SmallInteger, nullable=False, server_default=text("1")),
    Column("usage", JSONB),
    Column("charged", Boolean, nullable=False, server_default=text("false")),
    Column("upstream_finish_reason", Text, nullable=False, server_default=""),
)

call_answer = Table(
    "call_answer", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("call_id", Uuid, primary_key=True),
    Column("answer", LargeBinary, nullable=False),
    Column("stored_at", TIME, nullable=False, server_default=text("now()")),
)
Index("call_answer_by_age", call_answer.c.stored_at)

model = Table(
    "model", METADATA,
    Column("model_id", Text, primary_key=True),
    _words("alias"),
    Column("provider", SmallInteger, nullable=False),
    *map(_words, ("base_url", "upstream_model")),
    Column("sealed_key", LargeBinary),
    Column("active", Boolean, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("weight", Integer, nullable=False),
    Column("context_window", Integer, nullable=False),
    Column("max_output_tokens", Integer, nullable=False),
    Column("timeouts", JSONB, nullable=False),
    Column("extra_headers", JSONB, nullable=False),
    _words("price_provider"),
    Column("created_at", TIME, nullable=False),
    Column("updated_at", TIME, nullable=False),
    Column("idempotency_key", Text),
    *(
        Column(name, JSONB, nullable=False, server_default=text("'{}'"))
        for name in ("limits", "capabilities", "default_params", "quirks")
    ),
    Column("hedge_after", Double),
    Column("max_retries", SmallInteger, nullable=False, server_default=text("2")),
    Column("bills_failed_attempts", Boolean, nullable=False, server_default=text("false")),
    Column("tokenizer", Text, nullable=False, server_default=""),
)
Index("model_by_alias", model.c.alias, model.c.priority, model.c.model_id)
Index("model_key", model.c.idempotency_key, unique=True)

user_policy = Table(
    "user_policy", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("limits", JSONB),
    Column("keep_no_answers", Boolean, nullable=False),
    Column("updated_at", TIME, nullable=False),
)

conversation = Table(
    "conversation", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("conversation_id", Uuid, primary_key=True),
    _words("title"),
    Column("system_prompt", LargeBinary, nullable=False),
    _words("model"),
    Column("use_memories", Boolean, nullable=False),
    Column("compact_history", Boolean, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("branch", Integer, nullable=False),
    Column("length", Integer, nullable=False),
    Column("branches", Integer, nullable=False),
    Column("head_message_id", Uuid),
    Column("message_count", BigInteger, nullable=False),
    Column("tokens_total", BigInteger, nullable=False),
    Column("credit_micros_total", BigInteger, nullable=False),
    Column("summary", LargeBinary),
    Column("summary_branch", Integer, nullable=False),
    Column("summary_until", Integer, nullable=False),
    Column("running_call_id", Uuid),
    Column("running_message_id", Uuid),
    Column("running_request_id", Text),
    Column("running_branch", Integer),
    Column("running_first", Integer),
    Column("running_last", Integer),
    Column("running_until", TIME),
    Column("created_at", TIME, nullable=False),
    Column("last_message_at", TIME, nullable=False),
    Column("deleted_at", TIME),
    Column("idempotency_key", Text),
    Column("idempotency_hash", LargeBinary),
)
Index(
    "conversation_by_use", conversation.c.user_id, conversation.c.last_message_at, conversation.c.conversation_id,
    postgresql_where=conversation.c.deleted_at.is_(None),
)
Index("conversation_key", conversation.c.user_id, conversation.c.idempotency_key, unique=True)

branch = Table(
    "branch", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("conversation_id", Uuid, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer, nullable=False),
    Column("forked_at", Integer, nullable=False),
)

message = Table(
    "message", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("conversation_id", Uuid, primary_key=True),
    Column("branch", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("message_id", Uuid, nullable=False),
    Column("parent_message_id", Uuid),
    Column("role", SmallInteger, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    _words("token_family"),
    Column("tokens_consumed", BigInteger, nullable=False),
    Column("credit_micros", BigInteger, nullable=False),
    Column("call_id", Uuid),
    _words("request_id"),
    Column("request_hash", LargeBinary),
    Column("finish_reason", SmallInteger, nullable=False),
    Column("memory_ids", JSONB, nullable=False),
    Column("created_at", TIME, nullable=False),
)
Index("message_by_id", message.c.user_id, message.c.conversation_id, message.c.message_id, unique=True)
Index(
    "message_by_request", message.c.user_id, message.c.conversation_id, message.c.request_id, unique=True,
    postgresql_where=message.c.call_id.is_not(None),
)

# What the conversations of a user took in all; moves with theirs.
user_total = Table(
    "user_total", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("tokens_total", BigInteger, nullable=False),
    Column("credit_micros_total", BigInteger, nullable=False),
)

conversation_task = Table(
    "conversation_task", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("conversation_id", Uuid, primary_key=True),
    Column("kind", SmallInteger, primary_key=True, autoincrement=False),
    Column("branch", Integer, nullable=False),
    Column("until", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due_at", TIME, nullable=False),
)
Index("conversation_task_due", conversation_task.c.due_at)

sweep_cursor = Table(
    "sweep_cursor", METADATA,
    Column("name", Text, primary_key=True),
    Column("moved_to", TIME, nullable=False),
)

# One row whose revision every change of the registry raises, so that followers ask for one number.
registry_revision = Table(
    "registry_revision", METADATA,
    Column("singleton", Boolean, primary_key=True, server_default=text("true")),
    Column("revision", BigInteger, nullable=False),
)

outbox_tables(METADATA)
