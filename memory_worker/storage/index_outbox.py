"""What the vector database is still to be told, in PostgreSQL: written with the changes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import orjson

from memory_worker.domain.item import MemoryType
from memory_worker.storage.vectors import LIVE
from memory_worker.usecases.memory_ports import IndexChange, IndexEntry
from servicekit.db.database import Database

# With each the item as it is now; an item that is no more, or that has no vector yet, is to be removed.
CLAIM = f"""
WITH claimed AS (
    UPDATE index_change SET due_at = now() + %(lease)s
    WHERE (user_id, item_id) IN (
        SELECT user_id, item_id FROM index_change WHERE due_at <= now() ORDER BY due_at LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    ) RETURNING user_id, item_id, change
)
SELECT c.user_id, c.item_id, c.change, i.type, e.version, e.vector::text FROM claimed c
    LEFT JOIN item i ON i.user_id = c.user_id AND i.item_id = c.item_id AND {LIVE}
    LEFT JOIN embedding e ON e.user_id = i.user_id AND e.item_id = i.item_id AND e.embedder = %(embedder)s
"""
DONE = """
DELETE FROM index_change c USING unnest(%s::text[], %s::uuid[], %s::bigint[]) AS d (user_id, item_id, change)
WHERE c.user_id = d.user_id AND c.item_id = d.item_id AND c.change = d.change
"""
MARK = """
INSERT INTO index_change (user_id, item_id, due_at)
SELECT user_id, item_id, now() FROM unnest(%s::text[], %s::uuid[]) AS d (user_id, item_id)
ON CONFLICT (user_id, item_id) DO UPDATE SET change = DEFAULT, due_at = excluded.due_at
"""
_WITH_VECTOR = "FROM item i JOIN embedding e USING (user_id, item_id)"
EVERYTHING = f"""
SELECT i.user_id, i.item_id, e.version {_WITH_VECTOR}
WHERE e.embedder = %s AND {LIVE} AND (i.user_id, i.item_id) > (%s, %s) ORDER BY i.user_id, i.item_id LIMIT %s
"""
VERSIONS = f"""
SELECT i.item_id, i.user_id, e.version {_WITH_VECTOR} WHERE e.embedder = %s AND {LIVE} AND i.item_id = ANY(%s)
"""
FIRST = ("", UUID(int=0))


class PostgresIndexOutbox:
    """Implements IndexOutbox."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, embedder: str, *, limit: int, lease: timedelta) -> list[IndexChange]:
        arguments = {"embedder": embedder, "limit": limit, "lease": lease}
        async with self._database.connection() as connection:
            rows = await (await connection.execute(CLAIM, arguments)).fetchall()
        return [
            IndexChange(user_id, item_id, change, IndexEntry(
                user_id, item_id, MemoryType(kind), version, tuple(orjson.loads(vector))
            ) if vector is not None else None)
            for user_id, item_id, change, kind, version, vector in rows
        ]

    async def done(self, changes: Sequence[IndexChange]) -> None:
        async with self._database.connection() as connection:
            await connection.execute(DONE, (
                [each.user_id for each in changes], [each.item_id for each in changes],
                [each.change for each in changes],
            ))

    async def waiting(self) -> int:
        async with self._database.connection() as connection:
            row = await (await connection.execute("SELECT count(*) FROM index_change")).fetchone()
        return int(row[0]) if row else 0

    async def mark(self, items: Sequence[tuple[str, UUID]]) -> None:
        async with self._database.connection() as connection:
            await connection.execute(MARK, ([user_id for user_id, _ in items], [item_id for _, item_id in items]))

    async def forget(self, user_id: str) -> None:
        async with self._database.connection() as connection:
            await connection.execute("DELETE FROM index_change WHERE user_id = %s", (user_id,))

    async def live(
        self, embedder: str, *, after: tuple[str, UUID] | None, limit: int
    ) -> list[tuple[str, UUID, int]]:
        async with self._database.connection() as connection:
            rows = await (await connection.execute(EVERYTHING, (embedder, *(after or FIRST), limit))).fetchall()
        return [(user_id, item_id, version) for user_id, item_id, version in rows]

    async def versions(self, embedder: str, item_ids: Sequence[UUID]) -> dict[UUID, tuple[str, int]]:
        async with self._database.connection() as connection:
            rows = await (await connection.execute(VERSIONS, (embedder, list(item_ids)))).fetchall()
        return {item_id: (user_id, version) for item_id, user_id, version in rows}
