"""What keeps memories in order: expiry, retention, and the change from one embedder to another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from psycopg.rows import dict_row

from memory_worker.domain.item import Item, ItemStatus
from memory_worker.domain.job import JobState
from memory_worker.storage.item_rows import item_from_row
from memory_worker.storage.item_writer import ADD_VECTOR, ItemWriter, vector_row
from memory_worker.storage.vectors import FIELDS, LIVE
from memory_worker.usecases.memory_ports import IndexStatus, Retention, Vector
from servicekit.core.clock import Clock
from servicekit.db.database import Connection, Database

SERVING, FILLING, RETIRED = 1, 2, 3

EXPIRED = f"""
SELECT user_id, item_id FROM item WHERE status = {ItemStatus.ACTIVE:d} AND expires_at <= now()
ORDER BY expires_at LIMIT %s
"""
# Done jobs keep their decisions; what a model said of them goes.
PRUNE_ANSWERS = f"""
DELETE FROM model_answer WHERE (user_id, call_key) IN (
    SELECT a.user_id, a.call_key FROM model_answer a JOIN job j USING (user_id, job_id)
    WHERE a.answered_at < now() - %(kept)s::interval AND j.state = {JobState.DONE:d} LIMIT %(limit)s
)
"""
# An item that has ended goes with its history, its vectors, and the decisions that wrote nothing that is still there.
PRUNE_ITEMS = f"""
WITH gone AS (
    DELETE FROM item WHERE (user_id, item_id) IN (
        SELECT user_id, item_id FROM item
        WHERE status <> {ItemStatus.ACTIVE:d} AND updated_at < now() - %(kept)s::interval
        ORDER BY updated_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ) RETURNING user_id, item_id
), versions AS (
    DELETE FROM item_version v USING gone g WHERE v.user_id = g.user_id AND v.item_id = g.item_id
    RETURNING v.user_id, v.decision_id
), vectors AS (
    DELETE FROM embedding e USING gone g WHERE e.user_id = g.user_id AND e.item_id = g.item_id
), decisions AS (
    DELETE FROM decision d USING (SELECT DISTINCT user_id, decision_id FROM versions) v
    WHERE d.user_id = v.user_id AND d.decision_id = v.decision_id AND NOT EXISTS (
        SELECT 1 FROM item i WHERE i.user_id = d.user_id AND i.item_id = ANY(d.items)
            AND (i.user_id, i.item_id) NOT IN (SELECT user_id, item_id FROM gone)
    )
)
SELECT count(*) FROM gone
"""
# A job that has ended goes with its answers and with the decisions that no item stands upon; a dead one could be tried
# again until then.
PRUNE_JOBS = """
WITH gone AS (
    DELETE FROM job WHERE (user_id, job_id) IN (
        SELECT user_id, job_id FROM job WHERE ended_at < now() - %(kept)s::interval
        ORDER BY ended_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ) RETURNING user_id, job_id
), answers AS (
    DELETE FROM model_answer a USING gone g WHERE a.user_id = g.user_id AND a.job_id = g.job_id
), decisions AS (
    DELETE FROM decision d USING gone g WHERE d.user_id = g.user_id AND d.job_id = g.job_id AND NOT EXISTS (
        SELECT 1 FROM item i WHERE i.user_id = d.user_id AND i.item_id = ANY(d.items)
    )
)
SELECT count(*) FROM gone
"""
RETIRE_FILLING = f"UPDATE embedder SET state = {RETIRED}, since = now() WHERE state = {FILLING}"
RETIRE_SERVING = f"UPDATE embedder SET state = {RETIRED}, since = now() WHERE state = {SERVING}"
WANT = """
INSERT INTO embedder (name, state, since) VALUES (%s, %s, now())
ON CONFLICT (name) DO UPDATE SET state = excluded.state, since = excluded.since
"""
EMBEDDERS = f"SELECT state, name FROM embedder WHERE state < {RETIRED}"
_LACKING = f"""
FROM item i LEFT JOIN embedding e ON e.user_id = i.user_id AND e.item_id = i.item_id AND e.embedder = %(embedder)s
WHERE e.item_id IS NULL AND {LIVE}
"""
UNINDEXED = f"SELECT {FIELDS} {_LACKING} ORDER BY i.user_id, i.item_id LIMIT %(limit)s"
READY = f"""
SELECT 1 FROM embedder WHERE name = %(embedder)s AND state = {FILLING} AND since < now() - %(settled)s::interval
    AND NOT EXISTS (SELECT 1 {_LACKING})
"""
RETIRED_LONG = f"SELECT name FROM embedder WHERE state = {RETIRED} AND since < now() - %s::interval"
FORGET = f"DELETE FROM embedder WHERE name = %s AND state = {RETIRED}"
REMOVE = """
DELETE FROM embedding WHERE (user_id, embedder, item_id) IN (
    SELECT user_id, embedder, item_id FROM embedding WHERE embedder = %s LIMIT %s
)
"""
INDEX = f"""
SELECT count(*), count(e.item_id), (SELECT count(*) FROM index_change)
FROM item i LEFT JOIN embedding e ON e.user_id = i.user_id AND e.item_id = i.item_id AND e.embedder = %s
WHERE {LIVE}
"""
UNCHANGED = f"""
SELECT 1 FROM item WHERE user_id = %s AND item_id = %s AND version = %s AND status = {ItemStatus.ACTIVE:d} FOR SHARE
"""


class PostgresUpkeep:
    """Implements Upkeep."""

    def __init__(self, database: Database, writer: ItemWriter, *, clock: Clock) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock

    async def expire(self, *, limit: int) -> int:
        async with self._database.connection() as connection:
            found = await (await connection.execute(EXPIRED, (limit,))).fetchall()
        for user_id, item_id in found:
            async with self._writer.writing(user_id) as (connection, _):
                old, now = await self._writer.find(connection, user_id, item_id), self._clock.now()
                if old is None or old.status is not ItemStatus.ACTIVE or not old.expires_at or old.expires_at > now:
                    continue
                await self._writer.expire(connection, old, now)
        return len(found)

    async def prune(self, kept: Retention, *, limit: int) -> dict[str, int]:
        removed: dict[str, int] = {}
        async with self._database.connection() as connection:
            done = await connection.execute(PRUNE_ANSWERS, {"kept": kept.answers, "limit": limit})
            removed["model_answer"] = done.rowcount
            for table, statement, age in (
                ("item", PRUNE_ITEMS, kept.ended_items), ("job", PRUNE_JOBS, kept.ended_jobs),
            ):
                if age is not None:
                    row = await (await connection.execute(statement, {"kept": age, "limit": limit})).fetchone()
                    removed[table] = row[0] if row else 0
        return removed

    # Embedders

    async def announce(self, embedder: str) -> None:
        async with self._database.transaction() as connection:
            await _lock_embedders(connection)
            serving, filling = await _embedders(connection)
            if embedder == serving:
                # What was begun is given up.
                await connection.execute(RETIRE_FILLING)
            elif embedder != filling:
                await connection.execute(RETIRE_FILLING)
                await connection.execute(WANT, (embedder, FILLING if serving else SERVING))

    async def embedders(self) -> tuple[str, str]:
        async with self._database.connection() as connection:
            return await _embedders(connection)

    async def switch(self, embedder: str, *, settled: timedelta) -> bool:
        async with self._database.transaction() as connection:
            await _lock_embedders(connection)
            ready = await (await connection.execute(READY, {"embedder": embedder, "settled": settled})).fetchone()
            if ready is None:
                return False
            await connection.execute(RETIRE_SERVING)
            await connection.execute(WANT, (embedder, SERVING))
        return True

    async def remove_retired(self, *, after: timedelta, limit: int) -> list[str]:
        ended = []
        async with self._database.connection() as connection:
            for (name,) in await (await connection.execute(RETIRED_LONG, (after,))).fetchall():
                if (await connection.execute(REMOVE, (name, limit))).rowcount < limit:
                    await connection.execute(FORGET, (name,))
                    ended.append(name)
        return ended

    async def unindexed(self, embedder: str, *, limit: int) -> list[Item]:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            arguments: dict[str, Any] = {"embedder": embedder, "limit": limit}
            return [item_from_row(row) for row in await (await cursor.execute(UNINDEXED, arguments)).fetchall()]

    async def set_vector(self, item: Item, embedder: str, vector: Vector) -> None:
        async with self._database.transaction() as connection:
            same = await connection.execute(UNCHANGED, (item.user_id, item.item_id, item.version))
            if await same.fetchone() is None:
                return
            await connection.execute(ADD_VECTOR, vector_row(item, embedder, vector))
            await self._writer.mark(connection, item)

    async def index_status(self, embedder: str) -> IndexStatus:
        async with self._database.connection() as connection:
            row = await (await connection.execute(INDEX, (embedder,))).fetchone()
        return IndexStatus(*row) if row else IndexStatus(0, 0, 0)


async def _lock_embedders(connection: Connection) -> None:
    await connection.execute("LOCK TABLE embedder IN SHARE ROW EXCLUSIVE MODE")


async def _embedders(connection: Connection) -> tuple[str, str]:
    rows = await (await connection.execute(EMBEDDERS)).fetchall()
    by_state: dict[int, str] = dict(rows)
    return by_state.get(SERVING, ""), by_state.get(FILLING, "")
