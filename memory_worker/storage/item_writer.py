"""Parts of a transaction that writes one user's items: the row, its history, its vectors, and what a vector database is
to be told; always together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from memory_worker.domain.errors import ItemNotFound
from memory_worker.domain.item import Item, ItemStatus, MemoryType
from memory_worker.domain.job import Job, JobState
from memory_worker.storage.item_rows import ITEM_FIELDS, item_from_row, item_to_row, snapshot_of
from memory_worker.storage.vectors import FIELDS, LIVE, text_of
from memory_worker.usecases.memory_ports import Vector, Vectors
from memory_worker.usecases.ports import LeaseLost
from servicekit.db.database import Connection, Database

WORKER = "worker"
_SETS = ", ".join(f"{name} = %({name})s" for name in (*ITEM_FIELDS, "digest") if name not in ("user_id", "item_id"))

# The row is the user's lock, too: until the end of the transaction nobody else writes this user's memories.
MOVE_HEAD = """
INSERT INTO user_head (user_id, revision) VALUES (%s, 1)
ON CONFLICT (user_id) DO UPDATE SET revision = user_head.revision + 1 RETURNING revision
"""
# Of whoever holds the job, whose row stays locked, too: nobody else can have it until this is done.
MOVE_HEAD_OF_JOB = f"""
WITH held AS (
    SELECT user_id FROM job
    WHERE user_id = %(user_id)s AND job_id = %(job_id)s AND owner = %(owner)s AND state = {JobState.RUNNING:d}
    FOR UPDATE
)
INSERT INTO user_head (user_id, revision) SELECT user_id, 1 FROM held
ON CONFLICT (user_id) DO UPDATE SET revision = user_head.revision + 1 RETURNING revision
"""
ITEM = f"SELECT {FIELDS} FROM item i WHERE user_id = %s AND item_id = %s"
SAME = f"SELECT {FIELDS} FROM item i WHERE user_id = %s AND type = %s AND digest = %s AND {LIVE}"
TWIN = f"""
SELECT {FIELDS} FROM item i WHERE user_id = %s AND type = %s AND digest = %s AND status = {ItemStatus.ACTIVE:d}
    AND expires_at <= now()
"""
INSERT = f"""
INSERT INTO item ({", ".join(ITEM_FIELDS)}, digest, idempotency_key)
VALUES ({", ".join(f"%({name})s" for name in ITEM_FIELDS)}, %(digest)s, %(key)s)
"""
UPDATE = f"UPDATE item SET {_SETS} WHERE user_id = %(user_id)s AND item_id = %(item_id)s"
CLOSE_VERSION = """
UPDATE item_version SET closed_at = %s WHERE user_id = %s AND item_id = %s AND closed_at IS NULL
"""
ADD_VERSION = """
INSERT INTO item_version (user_id, item_id, version, operation, actor, decision_id, snapshot, recorded_at)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
REMOVE_VECTORS = "DELETE FROM embedding WHERE user_id = %s AND item_id = %s"
ADD_VECTOR = """
INSERT INTO embedding (user_id, embedder, item_id, version, is_active, type, sensitivity, expires_at, vector)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s::vector)
ON CONFLICT (user_id, embedder, item_id) DO UPDATE SET version = excluded.version, is_active = excluded.is_active,
    type = excluded.type, sensitivity = excluded.sensitivity, expires_at = excluded.expires_at,
    vector = excluded.vector
"""
RENEW_VECTORS = """
UPDATE embedding SET version = CASE WHEN %s THEN %s ELSE version END, is_active = %s, type = %s, sensitivity = %s,
    expires_at = %s
WHERE user_id = %s AND item_id = %s
"""
MARK = """
INSERT INTO index_change (user_id, item_id, due_at) VALUES (%s, %s, now())
ON CONFLICT (user_id, item_id) DO UPDATE SET change = DEFAULT, due_at = excluded.due_at
"""


class ItemWriter:
    """`tell_index`: there is a vector database."""

    def __init__(self, database: Database, *, tell_index: bool) -> None:
        self._database = database
        self._tell_index = tell_index

    @asynccontextmanager
    async def writing(self, user_id: str, *, pipelined: bool = True) -> AsyncIterator[tuple[Connection, int]]:
        """A transaction that is the only one that writes this user's memories; and the revision before it. Not
        `pipelined` where it matters how many rows a statement met."""
        async with self._database.transaction(pipelined=pipelined) as connection:
            row = await (await connection.execute(MOVE_HEAD, (user_id,))).fetchone()
            yield connection, row[0] - 1 if row else 0

    @asynccontextmanager
    async def working(self, job: Job, owner: str) -> AsyncIterator[tuple[Connection, int]]:
        """As writing, of whoever holds the job. Raises LeaseLost."""
        async with self._database.transaction(pipelined=True) as connection:
            found = await connection.execute(MOVE_HEAD_OF_JOB, {
                "user_id": job.user_id, "job_id": job.job_id, "owner": owner
            })
            row = await found.fetchone()
            if row is None:
                raise LeaseLost
            yield connection, row[0] - 1

    async def find(self, connection: Connection, user_id: str, item_id: UUID) -> Item | None:
        return await _first(connection, ITEM + " FOR UPDATE", (user_id, item_id))

    async def get(self, connection: Connection, user_id: str, item_id: UUID) -> Item:
        """Raises ItemNotFound."""
        found = await self.find(connection, user_id, item_id)
        if found is None:
            raise ItemNotFound("there is no such memory")
        return found

    async def same(self, connection: Connection, user_id: str, kind: MemoryType, digest: str) -> Item | None:
        """The active one with these words."""
        return await _first(connection, SAME, (user_id, int(kind), digest))

    async def insert(
        self, connection: Connection, item: Item, vectors: Vectors, operation: str, actor: str,
        decision_id: UUID | None, *, key: str = "",
    ) -> None:
        await self._end_expired_twin(connection, item)
        await connection.execute(INSERT, {**item_to_row(item), "key": key or None})
        await self._set_vectors(connection, item, vectors)
        await self._record(connection, item, operation, actor, decision_id)

    async def save(
        self, connection: Connection, old: Item, new: Item, operation: str, actor: str, decision_id: UUID | None, *,
        vectors: Vectors | None = None,
    ) -> None:
        """Vectors of a content that is no more go, whether or not there are new ones."""
        await connection.execute(UPDATE, item_to_row(new))
        await connection.execute(CLOSE_VERSION, (new.updated_at, new.user_id, new.item_id))
        if new.content != old.content:
            await connection.execute(REMOVE_VECTORS, (new.user_id, new.item_id))
            await self._set_vectors(connection, new, vectors or {})
        elif _filtered_by(new) != _filtered_by(old):
            told = (new.type, new.status) != (old.type, old.status)
            await connection.execute(
                RENEW_VECTORS, (told, new.version, *_filtered_by(new), new.user_id, new.item_id)
            )
            if told:
                await self.mark(connection, new)
        await self._record(connection, new, operation, actor, decision_id)

    async def _set_vectors(self, connection: Connection, item: Item, vectors: Vectors) -> None:
        for embedder, vector in vectors.items():
            await connection.execute(ADD_VECTOR, vector_row(item, embedder, vector))
        await self.mark(connection, item)

    async def mark(self, connection: Connection, item: Item) -> None:
        if self._tell_index:
            await connection.execute(MARK, (item.user_id, item.item_id))

    async def _end_expired_twin(self, connection: Connection, item: Item) -> None:
        """One with the same words whose time ran out, and that no sweep has met yet, makes room."""
        old = await _first(connection, TWIN, (item.user_id, int(item.type), item.digest))
        if old is not None:
            await self.expire(connection, old, item.updated_at)

    async def expire(self, connection: Connection, item: Item, now: datetime) -> None:
        ended = replace(item, status=ItemStatus.EXPIRED, version=item.version + 1, updated_at=now)
        await self.save(connection, item, ended, "expired", WORKER, None)

    @staticmethod
    async def _record(
        connection: Connection, item: Item, operation: str, actor: str, decision_id: UUID | None
    ) -> None:
        await connection.execute(ADD_VERSION, (
            item.user_id, item.item_id, item.version, operation, actor, decision_id, Jsonb(snapshot_of(item)),
            item.updated_at,
        ))


def _filtered_by(item: Item) -> tuple[bool, int, int, datetime | None]:
    return item.status is ItemStatus.ACTIVE, int(item.type), item.sensitivity, item.expires_at


def vector_row(item: Item, embedder: str, vector: Vector) -> tuple[Any, ...]:
    """Arguments of ADD_VECTOR."""
    return (item.user_id, embedder, item.item_id, item.version, *_filtered_by(item), text_of(vector))


async def _first(connection: Connection, statement: str, arguments: tuple[Any, ...]) -> Item | None:
    cursor = connection.cursor(row_factory=dict_row)
    row = await (await cursor.execute(statement, arguments)).fetchone()
    return item_from_row(row) if row else None
