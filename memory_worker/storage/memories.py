"""Items, their history and decisions in PostgreSQL; vectors beside them, in the same transactions."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from memory_worker.domain.decision import Action, Plan
from memory_worker.domain.errors import ItemNotChangeable, ItemNotFound, VersionConflict
from memory_worker.domain.item import Fact, Item, ItemStatus, MemoryType, digest_of, expiry_of, title_of
from memory_worker.domain.job import JobState
from memory_worker.storage.item_rows import (
    ITEM_FIELDS,
    decision_from_row,
    fact_to_json,
    item_from_row,
    item_from_snapshot,
    item_to_row,
    snapshot_of,
    verdict_to_json,
)
from memory_worker.usecases.ports import (
    AuditEntry,
    Decision,
    LeaseLost,
    MemoriesChanged,
    Outcome,
    Recall,
    UserSettings,
    Vector,
)
from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict
from servicekit.core.ids import IdSource
from servicekit.db.database import Connection, Database

_FIELDS = ", ".join(ITEM_FIELDS)
_SETS = ", ".join(f"{name} = %({name})s" for name in (*ITEM_FIELDS, "digest") if name not in ("user_id", "item_id"))
_LIVE = f"status = {ItemStatus.ACTIVE:d} AND (expires_at IS NULL OR expires_at > now())"

ADD_HEAD = "INSERT INTO user_head (user_id, revision) VALUES (%s, 0) ON CONFLICT DO NOTHING"
LOCK_HEAD = "SELECT revision FROM user_head WHERE user_id = %s FOR UPDATE"
MOVE_HEAD = "UPDATE user_head SET revision = revision + 1 WHERE user_id = %s"
REVISION = "SELECT coalesce((SELECT revision FROM user_head WHERE user_id = %s), 0)"
HOLDS_LEASE = f"""
SELECT 1 FROM job WHERE user_id = %s AND job_id = %s AND owner = %s AND state = {JobState.RUNNING:d} FOR UPDATE
"""
EXACT = f"SELECT {_FIELDS} FROM item WHERE user_id = %s AND type = %s AND digest = %s AND {_LIVE}"
TWIN = f"""
SELECT {_FIELDS} FROM item WHERE user_id = %s AND type = %s AND digest = %s AND status = {ItemStatus.ACTIVE:d}
    AND expires_at <= now()
"""
# Exact nearest neighbours among the user's own: sets are small, and an approximate index over all users would have to
# be filtered afterwards.
SIMILAR = f"""
SELECT {_FIELDS}, 1 - (embedding <=> %(vector)s::vector) AS score FROM item
WHERE user_id = %(user_id)s AND type = ANY(%(types)s) AND embedder = %(embedder)s AND {_LIVE}
ORDER BY embedding <=> %(vector)s::vector, item_id LIMIT %(most)s
"""
SIMILARITIES = """
SELECT item_id, 1 - (embedding <=> %s::vector) AS score FROM item
WHERE user_id = %s AND item_id = ANY(%s) AND embedder = %s
"""
CONSTRAINTS = f"""
SELECT {_FIELDS} FROM item WHERE user_id = %s AND type = {MemoryType.CONSTRAINT:d} AND {_LIVE}
ORDER BY importance DESC, updated_at DESC, item_id LIMIT %s
"""
ITEM = f"SELECT {_FIELDS} FROM item WHERE user_id = %s AND item_id = %s"
LIST = f"""
SELECT {_FIELDS} FROM item WHERE user_id = %(user_id)s AND status = %(status)s
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
INSERT = f"""
INSERT INTO item ({_FIELDS}, digest, embedder, embedding, idempotency_key)
VALUES ({", ".join(f"%({name})s" for name in ITEM_FIELDS)}, %(digest)s, %(embedder)s, %(vector)s::vector, %(key)s)
"""
UPDATE = f"UPDATE item SET {_SETS} WHERE user_id = %(user_id)s AND item_id = %(item_id)s"
SET_VECTOR = "UPDATE item SET embedder = %s, embedding = %s::vector WHERE user_id = %s AND item_id = %s"
CLOSE_VERSION = """
UPDATE item_version SET closed_at = %s WHERE user_id = %s AND item_id = %s AND closed_at IS NULL
"""
ADD_VERSION = """
INSERT INTO item_version (user_id, item_id, version, operation, actor, decision_id, snapshot, recorded_at)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
ADD_DECISION = """
INSERT INTO decision (
    user_id, job_id, number, decision_id, fact, action, reason, verdicts, items, policy, recall, prompts, decided_at
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
DECISIONS = "SELECT * FROM decision WHERE user_id = %s AND job_id = %s ORDER BY number"
DECISION = "SELECT * FROM decision WHERE user_id = %s AND decision_id = %s"
DECISION_ABOUT = """
SELECT d.* FROM item_version v JOIN decision d ON d.user_id = v.user_id AND d.decision_id = v.decision_id
WHERE v.user_id = %s AND v.item_id = %s ORDER BY v.version DESC LIMIT 1
"""
SETTINGS = "SELECT memory_enabled, implicit_enabled, sensitive_enabled FROM user_settings WHERE user_id = %s"
SET_SETTINGS = """
INSERT INTO user_settings (user_id, memory_enabled, implicit_enabled, sensitive_enabled) VALUES (%s, %s, %s, %s)
ON CONFLICT (user_id) DO UPDATE SET memory_enabled = excluded.memory_enabled,
    implicit_enabled = excluded.implicit_enabled, sensitive_enabled = excluded.sensitive_enabled
"""
BY_KEY = f"SELECT {_FIELDS} FROM item WHERE user_id = %s AND idempotency_key = %s"
AUDIT = """
SELECT * FROM item_version
WHERE user_id = %(user_id)s AND (%(item_id)s::uuid IS NULL OR item_id = %(item_id)s)
    AND (%(at)s::timestamptz IS NULL OR (recorded_at, item_id, version) < (%(at)s, %(before)s, %(version)s))
ORDER BY recorded_at DESC, item_id DESC, version DESC LIMIT %(limit)s
"""
ERASED_TABLES = ("item", "item_version", "decision", "job", "model_answer", "user_settings", "user_head")
TOMBSTONE = """
INSERT INTO erased_user (user_hash, erased_at) VALUES (%s, now())
ON CONFLICT (user_hash) DO UPDATE SET erased_at = excluded.erased_at
"""
EXPIRED = f"""
SELECT user_id, item_id FROM item WHERE status = {ItemStatus.ACTIVE:d} AND expires_at <= now()
ORDER BY expires_at LIMIT %s
"""
# Done jobs keep their decisions; what a model said of them goes.
PRUNE = f"""
DELETE FROM model_answer WHERE (user_id, call_key) IN (
    SELECT a.user_id, a.call_key FROM model_answer a JOIN job j USING (user_id, job_id)
    WHERE a.answered_at < now() - %s::interval AND j.state = {JobState.DONE:d} LIMIT %s
)
"""
INDEX = f"SELECT count(*), count(*) FILTER (WHERE embedder = %s) FROM item WHERE {_LIVE}"
UNINDEXED = f"SELECT {_FIELDS} FROM item WHERE embedder <> %s AND {_LIVE} ORDER BY user_id, item_id LIMIT %s"
WORKER = "worker"


def _text_of(vector: Vector) -> str | None:
    return f"[{','.join(map(repr, vector))}]" if vector else None


class PostgresMemories:
    """Implements MemoryStore."""

    def __init__(self, database: Database, *, clock: Clock, ids: IdSource) -> None:
        self._database = database
        self._clock = clock
        self._ids = ids

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

    # Decisions

    async def decisions_of(self, user_id: str, job_id: UUID) -> list[Decision]:
        return [decision_from_row(row) for row in await self._rows(DECISIONS, (user_id, job_id))]

    async def decision(self, user_id: str, decision_id: UUID) -> Decision | None:
        rows = await self._rows(DECISION, (user_id, decision_id))
        return decision_from_row(rows[0]) if rows else None

    async def decision_about(self, user_id: str, item_id: UUID) -> Decision | None:
        rows = await self._rows(DECISION_ABOUT, (user_id, item_id))
        return decision_from_row(rows[0]) if rows else None

    async def recall(
        self, user_id: str, fact: Fact, vector: Vector, embedder: str, *, most: int, floor: float
    ) -> Recall:
        async with self._database.transaction(read_only_snapshot=True) as connection:
            row = await (await connection.execute(REVISION, (user_id,))).fetchone()
            cursor = connection.cursor(row_factory=dict_row)
            exact = await (await cursor.execute(EXACT, (user_id, int(fact.type), fact.digest))).fetchone()
            rows = [] if exact else await (await cursor.execute(SIMILAR, {
                "user_id": user_id, "types": [int(fact.type)], "embedder": embedder, "vector": _text_of(vector),
                "most": most,
            })).fetchall()
        candidates = tuple((item_from_row(each), float(each["score"])) for each in rows if each["score"] >= floor)
        return Recall(candidates, row[0] if row else 0, exact=item_from_row(exact) if exact else None)

    async def apply(self, outcome: Outcome, owner: str, embedder: str) -> Decision:
        job, now = outcome.job, self._clock.now()
        decision_id = self._ids.new_id()
        async with self._writing(job.user_id) as (connection, revision):
            held = await (await connection.execute(HOLDS_LEASE, (job.user_id, job.job_id, owner))).fetchone()
            if held is None:
                raise LeaseLost
            if revision != outcome.revision and outcome.plan.action is not Action.DROP:
                raise MemoriesChanged
            items = await self._write(connection, outcome, decision_id, embedder, now)
            decision = Decision(
                decision_id, job.job_id, outcome.number, outcome.fact, outcome.plan.action, outcome.reason,
                outcome.verdicts, items, outcome.policy, outcome.recall, outcome.prompts, now,
            )
            await connection.execute(ADD_DECISION, (
                job.user_id, job.job_id, outcome.number, decision_id, Jsonb(fact_to_json(outcome.fact)),
                int(decision.action), decision.reason, Jsonb([verdict_to_json(each) for each in decision.verdicts]),
                list(items), decision.policy, decision.recall, decision.prompts, now,
            ))
        return decision

    async def _write(
        self, connection: Connection, outcome: Outcome, decision_id: UUID, embedder: str, now: datetime
    ) -> tuple[UUID, ...]:
        """The items of a plan: the one that carries the fact, then those superseded."""
        plan, fact, job = outcome.plan, outcome.fact, outcome.job
        if plan.action is Action.DROP:
            return ()
        if plan.action is Action.MERGE:
            outcome = await self._merged_elsewhere(connection, outcome)
            plan = outcome.plan
        by = (WORKER, decision_id)
        if plan.action is Action.ADD:
            carrier = Item(
                user_id=job.user_id, item_id=self._ids.new_id(), type=fact.type, title=fact.title,
                content=fact.content, confidence=fact.confidence, importance=fact.importance,
                sensitivity=fact.sensitivity, is_explicit=fact.is_explicit, status=ItemStatus.ACTIVE, version=1,
                valid_from=job.occurred_at, valid_to=None, expires_at=expiry_of(fact.type, job.occurred_at),
                created_at=now, updated_at=now, conversation_id=job.conversation_id, message_id=job.message_id,
                job_id=job.job_id,
            )
        else:
            assert plan.target is not None
            carrier = await self._strengthened(connection, plan.target, outcome, now)
        # Closed first, so that the words of one that goes may be those of the one that comes. What was said later than
        # this turn, which came late, stays: it is the turn's own fact that is history already.
        closed = []
        for item_id in plan.superseded:
            old = await self._locked(connection, job.user_id, item_id)
            if old.valid_from > job.occurred_at:
                if plan.action is Action.ADD and (carrier.valid_to is None or old.valid_from < carrier.valid_to):
                    carrier = replace(
                        carrier, status=ItemStatus.SUPERSEDED, superseded_by=item_id, valid_to=old.valid_from
                    )
                continue
            closed.append(item_id)
            await self._save(connection, replace(
                old, status=ItemStatus.SUPERSEDED, version=old.version + 1, superseded_by=carrier.item_id,
                valid_to=max(old.valid_from, job.occurred_at), updated_at=now,
            ), "superseded", *by)
        if plan.action is Action.ADD:
            await self._end_expired_twin(connection, carrier, now)
            await self._insert(connection, carrier, outcome.vector, embedder, "created", *by)
        else:
            operation = "merged" if plan.action is Action.MERGE else "confirmed"
            await self._save(connection, carrier, operation, *by)
            if plan.action is Action.MERGE and outcome.merged_vector:
                await connection.execute(
                    SET_VECTOR, (embedder, _text_of(outcome.merged_vector), job.user_id, carrier.item_id)
                )
        return (carrier.item_id, *closed)

    async def _merged_elsewhere(self, connection: Connection, outcome: Outcome) -> Outcome:
        """When the merged text is what another item says already, that one is kept and the target superseded by it."""
        plan = outcome.plan
        assert plan.target is not None
        old = await self._locked(connection, outcome.job.user_id, plan.target)
        cursor = connection.cursor(row_factory=dict_row)
        digest = digest_of(old.type, plan.merged)
        same = await (await cursor.execute(EXACT, (old.user_id, int(old.type), digest))).fetchone()
        if same is None or same["item_id"] == plan.target:
            return outcome
        closed = tuple(sorted({*plan.superseded, plan.target} - {same["item_id"]}))
        return replace(outcome, plan=Plan(Action.KEEP, same["item_id"], superseded=closed))

    async def _end_expired_twin(self, connection: Connection, item: Item, now: datetime) -> None:
        """One with the same words whose time ran out, and that no sweep has met yet, makes room."""
        cursor = connection.cursor(row_factory=dict_row)
        row = await (await cursor.execute(TWIN, (item.user_id, int(item.type), item.digest))).fetchone()
        if row is not None:
            old = item_from_row(row)
            await self._save(connection, replace(
                old, status=ItemStatus.EXPIRED, version=old.version + 1, updated_at=now
            ), "expired", WORKER, None)

    async def _strengthened(self, connection: Connection, target: UUID, outcome: Outcome, now: datetime) -> Item:
        """An item that was said again: what it knows of the world grows, its protection never shrinks."""
        plan, fact, job = outcome.plan, outcome.fact, outcome.job
        old = await self._locked(connection, job.user_id, target)
        expiry = expiry_of(old.type, job.occurred_at)
        content = plan.merged if plan.action is Action.MERGE else old.content
        return replace(
            old, content=content, title=title_of("", content) if plan.action is Action.MERGE else old.title,
            confidence=max(old.confidence, fact.confidence), importance=max(old.importance, fact.importance),
            sensitivity=max(old.sensitivity, fact.sensitivity), is_explicit=old.is_explicit or fact.is_explicit,
            version=old.version + 1, updated_at=now, confirmations=old.confirmations + 1,
            expires_at=max(old.expires_at, expiry) if old.expires_at and expiry else old.expires_at,
        )

    # Reading

    async def similar(
        self, user_id: str, vector: Vector, embedder: str, *, types: Sequence[MemoryType], most: int, floor: float
    ) -> list[tuple[Item, float]]:
        rows = await self._rows(SIMILAR, {
            "user_id": user_id, "types": [int(each) for each in types], "embedder": embedder,
            "vector": _text_of(vector), "most": most,
        })
        return [(item_from_row(row), float(row["score"])) for row in rows if row["score"] >= floor]

    async def similarities(
        self, user_id: str, vector: Vector, embedder: str, item_ids: Sequence[UUID]
    ) -> dict[UUID, float]:
        rows = await self._rows(SIMILARITIES, (_text_of(vector), user_id, list(item_ids), embedder))
        return {row["item_id"]: float(row["score"]) for row in rows}

    async def constraints(self, user_id: str, *, most: int) -> list[Item]:
        return [item_from_row(row) for row in await self._rows(CONSTRAINTS, (user_id, most))]

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

    async def create(
        self, item: Item, vector: Vector, embedder: str, *, actor: str, idempotency_key: str
    ) -> Item:
        async with self._writing(item.user_id) as (connection, _):
            cursor = connection.cursor(row_factory=dict_row)
            if idempotency_key:
                known = await (await cursor.execute(BY_KEY, (item.user_id, idempotency_key))).fetchone()
                if known is not None:
                    found = item_from_row(known)
                    if (found.type, found.digest) != (item.type, item.digest) and found.version == 1:
                        raise IdempotencyConflict("the idempotency_key was used before with other content")
                    return found
            same = await (await cursor.execute(EXACT, (item.user_id, int(item.type), item.digest))).fetchone()
            if same is not None:
                return item_from_row(same)
            await self._end_expired_twin(connection, item, item.created_at)
            await self._insert(connection, item, vector, embedder, "created", actor, None, key=idempotency_key)
        return item

    async def change(
        self, user_id: str, item_id: UUID, changes: Mapping[str, Any], vector: Vector, embedder: str, *, actor: str,
        operation: str, version: int | None,
    ) -> Item:
        async with self._writing(user_id) as (connection, _):
            old = await self._locked(connection, user_id, item_id)
            if version is not None and version != old.version:
                raise VersionConflict("the memory was changed meanwhile", version=old.version)
            if old.status is ItemStatus.DELETED and changes.get("status") is ItemStatus.DELETED:
                return old
            if old.status is not ItemStatus.ACTIVE:
                raise ItemNotChangeable(f"the memory is {old.status.name.lower()}")
            now = self._clock.now()
            new = replace(old, **changes, version=old.version + 1, updated_at=now)
            if new.digest != old.digest and new.status is ItemStatus.ACTIVE:
                await self._refuse_twice(connection, new)
            await self._save(connection, new, operation, actor, None)
            if vector:
                await connection.execute(SET_VECTOR, (embedder, _text_of(vector), user_id, item_id))
        return new

    async def restore(self, user_id: str, item_id: UUID, *, actor: str) -> Item:
        async with self._writing(user_id) as (connection, _):
            old = await self._locked(connection, user_id, item_id)
            if old.status is ItemStatus.ACTIVE:
                return old
            now = self._clock.now()
            back = replace(
                old, status=ItemStatus.ACTIVE, version=old.version + 1, updated_at=now, superseded_by=None,
                valid_to=None, expires_at=expiry_of(old.type, now),
            )
            if old.superseded_by is not None:
                # The unit is undone as one: what stands in its place goes.
                rows = await self._locked_or_none(connection, user_id, old.superseded_by)
                if rows is not None and rows.status is ItemStatus.ACTIVE:
                    await self._save(connection, replace(
                        rows, status=ItemStatus.SUPERSEDED, version=rows.version + 1, superseded_by=item_id,
                        valid_to=now, updated_at=now,
                    ), "superseded", actor, None)
            await self._refuse_twice(connection, back)
            await self._save(connection, back, "restored", actor, None)
        return back

    async def _refuse_twice(self, connection: Connection, item: Item) -> None:
        cursor = connection.cursor(row_factory=dict_row)
        same = await (await cursor.execute(EXACT, (item.user_id, int(item.type), item.digest))).fetchone()
        if same is not None and same["item_id"] != item.item_id:
            raise ItemNotChangeable("another memory says the same", item_id=str(same["item_id"]))

    # Ends

    async def erase(self, user_id: str) -> dict[str, int]:
        erased: dict[str, int] = {}
        async with self._database.transaction() as connection:
            await connection.execute(ADD_HEAD, (user_id,))
            await connection.execute(LOCK_HEAD, (user_id,))
            for table in ERASED_TABLES:
                done = await connection.execute(f"DELETE FROM {table} WHERE user_id = %s".encode(), (user_id,))
                erased[table] = done.rowcount
            await connection.execute(TOMBSTONE, (hashlib.sha256(user_id.encode()).digest(),))
        return erased

    async def expire(self, *, limit: int) -> int:
        found = await self._rows(EXPIRED, (limit,))
        for row in found:
            async with self._writing(row["user_id"]) as (connection, _):
                old = await self._locked_or_none(connection, row["user_id"], row["item_id"])
                now = self._clock.now()
                if old is None or old.status is not ItemStatus.ACTIVE or not old.expires_at or old.expires_at > now:
                    continue
                await self._save(connection, replace(
                    old, status=ItemStatus.EXPIRED, version=old.version + 1, updated_at=now
                ), "expired", WORKER, None)
        return len(found)

    async def prune(self, *, older_than: timedelta, limit: int) -> int:
        async with self._database.connection() as connection:
            return (await connection.execute(PRUNE, (older_than, limit))).rowcount

    async def unindexed(self, embedder: str, *, limit: int) -> list[Item]:
        return [item_from_row(row) for row in await self._rows(UNINDEXED, (embedder, limit))]

    async def set_vector(self, item: Item, vector: Vector, embedder: str) -> None:
        async with self._database.connection() as connection:
            await connection.execute(
                SET_VECTOR + " AND version = %s",
                (embedder, _text_of(vector), item.user_id, item.item_id, item.version),
            )

    async def index_status(self, embedder: str) -> tuple[int, int]:
        async with self._database.connection() as connection:
            row = await (await connection.execute(INDEX, (embedder,))).fetchone()
        return (row[0], row[1]) if row else (0, 0)

    # Parts of a transaction

    @asynccontextmanager
    async def _writing(self, user_id: str) -> AsyncIterator[tuple[Connection, int]]:
        """A transaction that is the only one that writes this user's memories; and the revision before it."""
        async with self._database.transaction() as connection:
            await connection.execute(ADD_HEAD, (user_id,))
            row = await (await connection.execute(LOCK_HEAD, (user_id,))).fetchone()
            yield connection, row[0] if row else 0
            await connection.execute(MOVE_HEAD, (user_id,))

    async def _locked_or_none(self, connection: Connection, user_id: str, item_id: UUID) -> Item | None:
        cursor = connection.cursor(row_factory=dict_row)
        row = await (await cursor.execute(ITEM + " FOR UPDATE", (user_id, item_id))).fetchone()
        return item_from_row(row) if row else None

    async def _locked(self, connection: Connection, user_id: str, item_id: UUID) -> Item:
        found = await self._locked_or_none(connection, user_id, item_id)
        if found is None:
            raise ItemNotFound("there is no such memory")
        return found

    async def _insert(
        self, connection: Connection, item: Item, vector: Vector, embedder: str, operation: str, actor: str,
        decision_id: UUID | None, *, key: str = "",
    ) -> None:
        await connection.execute(INSERT, {
            **item_to_row(item), "embedder": embedder, "vector": _text_of(vector), "key": key or None
        })
        await self._record(connection, item, operation, actor, decision_id)

    async def _save(
        self, connection: Connection, item: Item, operation: str, actor: str, decision_id: UUID | None
    ) -> None:
        await connection.execute(UPDATE, item_to_row(item))
        await connection.execute(CLOSE_VERSION, (item.updated_at, item.user_id, item.item_id))
        await self._record(connection, item, operation, actor, decision_id)

    @staticmethod
    async def _record(
        connection: Connection, item: Item, operation: str, actor: str, decision_id: UUID | None
    ) -> None:
        await connection.execute(ADD_VERSION, (
            item.user_id, item.item_id, item.version, operation, actor, decision_id, Jsonb(snapshot_of(item)),
            item.updated_at,
        ))

    async def _rows(self, statement: str, arguments: Any) -> list[dict[str, Any]]:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return await (await cursor.execute(statement, arguments)).fetchall()
