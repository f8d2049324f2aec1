"""The schema as data. Every key begins with user_id."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.types import UserDefinedType

from servicekit.db.leases import lease_table
from servicekit.kafka.offsets import offset_table

SCHEMA = "memory"
METADATA = MetaData()
TIME = DateTime(timezone=True)


class Vector(UserDefinedType[Any]):
    """pgvector's type, of any length: vectors of different embedders stand beside each other."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "vector"


ischema_names["vector"] = Vector  # so that SQLAlchemy knows the type when it reads a schema

item = Table(
    "item", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("item_id", Uuid, primary_key=True),
    Column("type", SmallInteger, nullable=False),
    Column("title", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("confidence", Double, nullable=False),
    Column("importance", Double, nullable=False),
    Column("sensitivity", SmallInteger, nullable=False),
    Column("is_explicit", Boolean, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("valid_from", TIME, nullable=False),
    Column("valid_to", TIME),
    Column("expires_at", TIME),
    Column("created_at", TIME, nullable=False),
    Column("updated_at", TIME, nullable=False),
    Column("superseded_by", Uuid),
    Column("conversation_id", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("job_id", Uuid),
    Column("confirmations", Integer, nullable=False),
    Column("idempotency_key", Text),
)
Index(
    "item_active_once", item.c.user_id, item.c.type, item.c.digest, unique=True, postgresql_where=item.c.status == 1
)
Index("item_key", item.c.user_id, item.c.idempotency_key, unique=True)
Index("item_expiry", item.c.expires_at, postgresql_where=item.c.status == 1)
Index(
    "item_constraints", item.c.user_id, item.c.importance.desc(), item.c.updated_at.desc(), item.c.item_id,
    postgresql_where=(item.c.type == 2) & (item.c.status == 1),
)
Index("item_by_id", item.c.item_id)  # for what a vector database has, which is not told of users
Index("item_ended", item.c.updated_at, postgresql_where=item.c.status != 1)

# The vector of an item's content, one for each embedder; `version` is that of the item when it was made, or when what
# a vector database is told beside it (the type) changed. What a search filters by stands here, too, so that it reads
# no items but those that it finds.
embedding = Table(
    "embedding", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("embedder", Text, primary_key=True),
    Column("item_id", Uuid, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("type", SmallInteger, nullable=False),
    Column("sensitivity", SmallInteger, nullable=False),
    Column("expires_at", TIME),
    Column("vector", Vector, nullable=False),
)

# Which embedder's vectors are compared (1), which one's are being made (2), whose are to be removed (3).
embedder = Table(
    "embedder", METADATA,
    Column("name", Text, primary_key=True),
    Column("state", SmallInteger, nullable=False),
    Column("since", TIME, nullable=False),
)
Index("embedder_once", embedder.c.state, unique=True, postgresql_where=embedder.c.state < 3)

# Items whose state a vector database is still to be told; written with the change itself. `change` rises with each, so
# that what changed while it was carried stays.
index_change = Table(
    "index_change", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("item_id", Uuid, primary_key=True),
    Column("change", BigInteger, Identity(), nullable=False),
    Column("due_at", TIME, nullable=False),
)
Index("index_change_due", index_change.c.due_at)

# Every version of every item: what it was from recorded_at to closed_at.
item_version = Table(
    "item_version", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("item_id", Uuid, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("operation", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("decision_id", Uuid),
    Column("snapshot", JSONB, nullable=False),
    Column("recorded_at", TIME, nullable=False),
    Column("closed_at", TIME),
)
Index("item_version_by_time", item_version.c.user_id, item_version.c.recorded_at)

# One row a user: its lock makes one writer of several workers, its revision tells whether a decision still stands.
user_head = Table(
    "user_head", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False),
)

decision = Table(
    "decision", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("job_id", Uuid, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("decision_id", Uuid, nullable=False),
    Column("fact", JSONB, nullable=False),
    Column("action", SmallInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("verdicts", JSONB, nullable=False),
    Column("items", ARRAY(Uuid), nullable=False),
    Column("policy", Text, nullable=False),
    Column("recall", Text, nullable=False),
    Column("prompts", Text, nullable=False),
    Column("decided_at", TIME, nullable=False),
)
Index("decision_by_id", decision.c.user_id, decision.c.decision_id, unique=True)

job = Table(
    "job", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("job_id", Uuid, primary_key=True),
    Column("conversation_id", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("turn", JSONB),
    Column("occurred_at", TIME, nullable=False),
    Column("created_at", TIME, nullable=False),
    Column("due_at", TIME),
    Column("ended_at", TIME),
    Column("owner", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("calls", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("credit_micros", BigInteger, nullable=False),
)
Index("job_by_turn", job.c.user_id, job.c.message_id, unique=True)
Index("job_by_id", job.c.job_id)
Index("job_open", job.c.user_id, postgresql_where=job.c.due_at.is_not(None))
Index("job_due", job.c.due_at, postgresql_where=job.c.due_at.is_not(None))
Index("job_ended", job.c.ended_at, postgresql_where=job.c.ended_at.is_not(None))

model_answer = Table(
    "model_answer", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("call_key", Text, primary_key=True),
    Column("job_id", Uuid, nullable=False),
    Column("stage", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("credit_micros", BigInteger, nullable=False),
    Column("call_id", Text, nullable=False),
    Column("answered_at", TIME),
)
Index("model_answer_by_age", model_answer.c.answered_at)
Index(
    "model_answer_open", model_answer.c.user_id, model_answer.c.job_id,
    postgresql_where=model_answer.c.answered_at.is_(None),
)

user_settings = Table(
    "user_settings", METADATA,
    Column("user_id", Text, primary_key=True),
    Column("memory_enabled", Boolean, nullable=False),
    Column("implicit_enabled", Boolean, nullable=False),
    Column("sensitive_enabled", Boolean, nullable=False),
)

# Whom was erased, by hash, and when: so that what arrives late can be told.
erased_user = Table(
    "erased_user", METADATA,
    Column("user_hash", LargeBinary, primary_key=True),
    Column("erased_at", TIME, nullable=False),
)

offset_table(METADATA)
lease_table(METADATA)
