"""Items and their history in PostgreSQL: reading, writing by hand, erasing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row

from memory_worker.domain.errors import ItemNotChangeable, VersionConflict
from memory_worker.domain.item import Item, ItemStatus, MemoryType, expiry_of
from memory_worker.storage.item_rows import item_from_row, item_from_snapshot
from memory_worker.storage.item_writer import ITEM, ItemWriter
from memory_worker.storage.vectors import ALLOWED, FIELDS, LIVE, PROPOSED, SCAN, arguments_of, scored, text_of
from memory_worker.usecases.memory_ports import (
    AuditEntry,
    Looking,
    Outlook,
    UserSettings,
    Vector,
    Vectors,
)
from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict
from servicekit.db.database import Connection, Database

SIMILARITIES = """
SELECT item_id, 1 - (vector <=> %s::vector) AS score FROM embedding
WHERE user_id = %s AND item_id = ANY(%s) AND embedder = %s AND vector_dims(vector) = %s
"""
CONSTRAINTS = f"""
SELECT {FIELDS} FROM item i
WHERE user_id = %(user_id)s AND type = {MemoryType.CONSTRAINT:d} AND sensitivity <= {ALLOWED} AND {LIVE}
ORDER BY importance DESC, updated_at DESC, item_id LIMIT %(most)s
"""
LIST = f"""
SELECT {FIELDS} FROM item i WHERE user_id = %(user_id)s AND status = %(status)s
    AND (%(type)s::smallint IS NULL OR type = %(type)s) AND (%(before)s::uuid IS NULL OR item_id < %(before)s)
ORDER BY item_id DESC LIMIT %(limit)s
"""
AS_OF = f"""
SELECT snapshot FROM item_version WHERE user_id = %(user_id)s AND recorded_at <= %(moment)s
    AND (closed_at IS NULL OR closed_at > %(moment)s) AND (%(item_id)s::uuid IS NULL OR item_id = %(item_id)s)
    AND (snapshot->>'status')::int = {ItemStatus.ACTIVE:d}
    AND (%(type)s::smallint IS NULL OR (snapshot->>'type')::int = %(type)s)
    AND (%(before)s::uuid IS NULL OR item_id < %(before)s)
ORDER BY item_id DESC LIMIT %(limit)s
"""
CONTENTS = "SELECT content FROM item WHERE user_id = %s AND item_id::text = ANY(%s)"
SETTINGS = "SELECT memory_enabled, implicit_enabled, sensitive_enabled FROM user_settings WHERE user_id = %s"
SET_SETTINGS = """
INSERT INTO user_settings (user_id, memory_enabled, implicit_enabled, sensitive_enabled) VALUES (%s, %s, %s, %s)
ON CONFLICT (user_id) DO UPDATE SET memory_enabled = excluded.memory_enabled,
    implicit_enabled = excluded.implicit_enabled, sensitive_enabled = excluded.sensitive_enabled
"""
BY_KEY = f"SELECT {FIELDS} FROM item i WHERE user_id = %s AND idempotency_key = %s"
AUDIT = """
SELECT * FROM item_version
WHERE user_id = %(user_id)s AND (%(item_id)s::uuid IS NULL OR item_id = %(item_id)s)
    AND (%(at)s::timestamptz IS NULL OR (recorded_at, item_id, version) < (%(at)s, %(before)s, %(version)s))
ORDER BY recorded_at DESC, item_id DESC, version DESC LIMIT %(limit)s
"""
ERASED_TABLES = (
    "item", "item_version", "embedding", "decision", "job", "model_answer", "user_settings", "user_head"
)
MARK_ALL = """
INSERT INTO index_change (user_id, item_id, due_at) SELECT user_id, item_id, now() FROM item WHERE user_id = %s
ON CONFLICT (user_id, item_id) DO UPDATE SET change = DEFAULT, due_at = excluded.due_at
"""
TOMBSTONE = """
INSERT INTO erased_user (user_hash, erased_at) VALUES (%s, now())
ON CONFLICT (user_hash) DO UPDATE SET erased_at = excluded.erased_at
"""


class PostgresItems:
    """Implements ItemStore. `tell_index`: there is a vector database."""

    def __init__(self, database: Database, writer: ItemWriter, *, clock: Clock, tell_index: bool) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._tell_index = tell_index

    # Settings

    async def settings(self, user_id: str) -> UserSettings:
        async with self._database.connection() as connection:
            row = await (await connection.execute(SETTINGS, (user_id,))).fetchone()
        return UserSettings(user_id, *row) if row else UserSettings(user_id)

    async def set_settings(self, settings: UserSettings) -> None:
        async with self._database.connection() as connection:
            await connection.execute(SET_SETTINGS, (
                settings.user_id, settings.memory_enabled, settings.implicit_enabled, settings.sensitive_enabled
            ))

    # Reading

    async def look(
        self, user_id: str, looking: Looking | None, *, types: Sequence[MemoryType], most: int, floor: float,
        most_constraints: int,
    ) -> Outlook:
        near: tuple[tuple[Item, float], ...] = ()
        scanned, pinning = looking is None or looking.near is None, MemoryType.CONSTRAINT in types
        async with self._database.connection() as connection:
            switches, scan, pins = (connection.cursor(row_factory=dict_row) for _ in range(3))
            async with connection.pipeline():  # one round trip for all
                await switches.execute(SETTINGS, (user_id,))
                if pinning:
                    await pins.execute(CONSTRAINTS, {"user_id": user_id, "most": most_constraints})
                if looking is not None:
                    arguments = arguments_of(user_id, looking, types=types, most=most, most_sensitive=None)
                    await scan.execute(SCAN if scanned else PROPOSED, arguments)
            row = await switches.fetchone()
            settings = UserSettings(user_id, **row) if row else UserSettings(user_id)
            if not settings.memory_enabled:
                return Outlook(settings, (), ())
            constraints = await pins.fetchall() if pinning else []
            if looking is not None:
                rows = await scan.fetchall()
                if not scanned and len(rows) < most:
                    # Fewer than wanted: all that there are, or an index that lacks some (it was emptied, it lags).
                    every = await (await scan.execute(SCAN, arguments)).fetchall()
                    scanned, rows = len(every) > len(rows), every
                near = scored(rows, floor)
        return Outlook(settings, near, tuple(item_from_row(each) for each in constraints), scanned)

    async def similarities(
        self, user_id: str, vector: Vector, embedder: str, item_ids: Sequence[UUID]
    ) -> dict[UUID, float]:
        rows = await self._rows(SIMILARITIES, (text_of(vector), user_id, list(item_ids), embedder, len(vector)))
        return {row["item_id"]: float(row["score"]) for row in rows}

    async def items(
        self, user_id: str, *, status: ItemStatus, kind: MemoryType | None, before: UUID | None, limit: int
    ) -> list[Item]:
        rows = await self._rows(LIST, {
            "user_id": user_id, "status": int(status), "type": kind and int(kind), "before": before, "limit": limit
        })
        return [item_from_row(row) for row in rows]

    async def items_as_of(
        self, user_id: str, moment: datetime, *, kind: MemoryType | None, before: UUID | None, limit: int
    ) -> list[Item]:
        rows = await self._rows(AS_OF, {
            "user_id": user_id, "moment": moment, "item_id": None, "type": kind and int(kind), "before": before,
            "limit": limit,
        })
        return [item_from_snapshot(row["snapshot"]) for row in rows]

    async def item(self, user_id: str, item_id: UUID, *, as_of: datetime | None = None) -> Item | None:
        if as_of is None:
            rows = await self._rows(ITEM, (user_id, item_id))
            return item_from_row(rows[0]) if rows else None
        rows = await self._rows(AS_OF, {
            "user_id": user_id, "moment": as_of, "item_id": item_id, "type": None, "before": None, "limit": 1
        })
        return item_from_snapshot(rows[0]["snapshot"]) if rows else None

    async def contents_of(self, user_id: str, item_ids: Sequence[str]) -> list[str]:
        if not item_ids:
            return []
        return [row["content"] for row in await self._rows(CONTENTS, (user_id, list(item_ids)))]

    async def audit(
        self, user_id: str, *, item_id: UUID | None, before: tuple[datetime, UUID, int] | None, limit: int
    ) -> list[AuditEntry]:
        at, key, version = before or (None, None, None)
        rows = await self._rows(AUDIT, {
            "user_id": user_id, "item_id": item_id, "at": at, "before": key, "version": version, "limit": limit
        })
        return [
            AuditEntry(
                item_from_snapshot(row["snapshot"]), row["operation"], row["actor"], row["decision_id"],
                row["recorded_at"],
            )
            for row in rows
        ]

    # Writing by hand

    async def create(self, item: Item, vectors: Vectors, *, actor: str, idempotency_key: str) -> Item:
        async with self._writer.writing(item.user_id) as (connection, _):
            cursor = connection.cursor(row_factory=dict_row)
            if idempotency_key:
                known = await (await cursor.execute(BY_KEY, (item.user_id, idempotency_key))).fetchone()
                if known is not None:
                    found = item_from_row(known)
                    if (found.type, found.digest) != (item.type, item.digest) and found.version == 1:
                        raise IdempotencyConflict("the idempotency_key was used before with other content")
                    return found
            same = await self._writer.same(connection, item.user_id, item.type, item.digest)
            if same is not None:
                return same
            await self._writer.insert(connection, item, vectors, "created", actor, None, key=idempotency_key)
        return item

    async def change(
        self, user_id: str, item_id: UUID, changes: Mapping[str, Any], vectors: Vectors, *, actor: str,
        operation: str, version: int | None,
    ) -> Item:
        async with self._writer.writing(user_id) as (connection, _):
            old = await self._writer.get(connection, user_id, item_id)
            if version is not None and version != old.version:
                raise VersionConflict("the memory was changed meanwhile", version=old.version)
            if old.status is ItemStatus.DELETED and changes.get("status") is ItemStatus.DELETED:
                return old
            if old.status is not ItemStatus.ACTIVE:
                raise ItemNotChangeable(f"the memory is {old.status.name.lower()}")
            new = replace(old, **changes, version=old.version + 1, updated_at=self._clock.now())
            if new.digest != old.digest and new.status is ItemStatus.ACTIVE:
                await self._refuse_twice(connection, new)
            await self._writer.save(connection, old, new, operation, actor, None, vectors=vectors)
        return new

    async def restore(self, user_id: str, item_id: UUID, *, actor: str) -> Item:
        async with self._writer.writing(user_id) as (connection, _):
            old = await self._writer.get(connection, user_id, item_id)
            if old.status is ItemStatus.ACTIVE:
                return old
            now = self._clock.now()
            back = replace(
                old, status=ItemStatus.ACTIVE, version=old.version + 1, updated_at=now, superseded_by=None,
                valid_to=None, expires_at=expiry_of(old.type, now),
            )
            if old.superseded_by is not None:
                # The unit is undone as one: what stands in its place goes.
                newer = await self._writer.find(connection, user_id, old.superseded_by)
                if newer is not None and newer.status is ItemStatus.ACTIVE:
                    await self._writer.save(connection, newer, replace(
                        newer, status=ItemStatus.SUPERSEDED, version=newer.version + 1, superseded_by=item_id,
                        valid_to=now, updated_at=now,
                    ), "superseded", actor, None)
            await self._refuse_twice(connection, back)
            await self._writer.save(connection, old, back, "restored", actor, None)
        return back

    async def _refuse_twice(self, connection: Connection, item: Item) -> None:
        same = await self._writer.same(connection, item.user_id, item.type, item.digest)
        if same is not None and same.item_id != item.item_id:
            raise ItemNotChangeable("another memory says the same", item_id=str(same.item_id))

    async def erase(self, user_id: str) -> dict[str, int]:
        erased: dict[str, int] = {}
        async with self._writer.writing(user_id, pipelined=False) as (connection, _):
            if self._tell_index:
                await connection.execute(MARK_ALL, (user_id,))
            for table in ERASED_TABLES:
                done = await connection.execute(f"DELETE FROM {table} WHERE user_id = %s".encode(), (user_id,))
                erased[table] = done.rowcount
            await connection.execute(TOMBSTONE, (hashlib.sha256(user_id.encode()).digest(),))
        return erased

    async def _rows(self, statement: str, arguments: Any) -> list[dict[str, Any]]:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return await (await cursor.execute(statement, arguments)).fetchall()
