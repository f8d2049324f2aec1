"""Decisions in PostgreSQL: what they are made upon, and their writing, all or nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from memory_worker.domain.decision import Action, Plan
from memory_worker.domain.item import Fact, Item, ItemStatus, digest_of, title_of
from memory_worker.storage.item_rows import decision_from_row, fact_to_json, item_from_row, verdict_to_json
from memory_worker.storage.item_writer import WORKER, ItemWriter
from memory_worker.storage.vectors import (
    ANY_SENSITIVITY,
    FIELDS,
    LIVE,
    PROPOSED,
    SCAN,
    arguments_of,
    scored,
)
from memory_worker.usecases.memory_ports import Decision, Looking, MemoriesChanged, Outcome, Recall
from servicekit.core.clock import Clock
from servicekit.core.ids import IdSource
from servicekit.db.database import Connection, Database


def _recall_by(near: str) -> str:
    """One statement sees one state of the user's memories: their revision, the item that says the same (without a
    distance), and what is near."""
    return f"""
WITH same AS (
    SELECT {FIELDS}, NULL::double precision AS distance FROM item i
    WHERE user_id = %(user_id)s AND type = %(type)s AND digest = %(digest)s AND {LIVE}
), found AS (SELECT * FROM same UNION ALL SELECT * FROM ({near}) near WHERE NOT EXISTS (SELECT 1 FROM same))
SELECT coalesce((SELECT revision FROM user_head WHERE user_id = %(user_id)s), 0) AS revision, found.*
FROM (SELECT 1) AS always LEFT JOIN found ON true ORDER BY found.distance, found.item_id
"""


RECALL_BY_SCAN, RECALL_BY_PROPOSAL = _recall_by(SCAN), _recall_by(PROPOSED)
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


class PostgresDecisions:
    """Implements DecisionStore."""

    def __init__(self, database: Database, writer: ItemWriter, *, clock: Clock, ids: IdSource) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._ids = ids

    async def decisions_of(self, user_id: str, job_id: UUID) -> list[Decision]:
        return [decision_from_row(row) for row in await self._rows(DECISIONS, (user_id, job_id))]

    async def decision(self, user_id: str, decision_id: UUID) -> Decision | None:
        rows = await self._rows(DECISION, (user_id, decision_id))
        return decision_from_row(rows[0]) if rows else None

    async def decision_about(self, user_id: str, item_id: UUID) -> Decision | None:
        rows = await self._rows(DECISION_ABOUT, (user_id, item_id))
        return decision_from_row(rows[0]) if rows else None

    async def recall(self, user_id: str, fact: Fact, looking: Looking, *, most: int, floor: float) -> Recall:
        arguments = {
            **arguments_of(user_id, looking, types=[fact.type], most=most, most_sensitive=ANY_SENSITIVITY),
            "type": int(fact.type), "digest": fact.digest,
        }
        scanned = looking.near is None
        rows = await self._rows(RECALL_BY_SCAN if scanned else RECALL_BY_PROPOSAL, arguments)
        if not scanned and len(rows) < most:
            # Fewer than wanted: all that there are, or an index that lacks some.
            every = await self._rows(RECALL_BY_SCAN, arguments)
            scanned = len(every) > len(rows)
            rows = every
        revision = rows[0]["revision"]
        items = [row for row in rows if row["item_id"] is not None]
        if items and items[0]["distance"] is None:
            return Recall((), revision, exact=item_from_row(items[0]))
        return Recall(scored(items, floor), revision, scanned=scanned)

    async def apply(self, outcome: Outcome, owner: str) -> Decision:
        job, now = outcome.job, self._clock.now()
        decision_id = self._ids.new_id()
        async with self._writer.working(job, owner) as (connection, revision):
            if revision != outcome.revision and outcome.plan.action is not Action.DROP:
                raise MemoriesChanged
            items = await self._write(connection, outcome, decision_id, now)
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
        self, connection: Connection, outcome: Outcome, decision_id: UUID, now: datetime
    ) -> tuple[UUID, ...]:
        """The items of a plan: the one that carries the fact, then those superseded."""
        plan, fact, job = outcome.plan, outcome.fact, outcome.job
        if plan.action is Action.DROP:
            return ()
        if plan.action is Action.MERGE:
            outcome = await self._merged_elsewhere(connection, outcome)
            plan = outcome.plan
        by = (WORKER, decision_id)
        known: Item | None = None
        if plan.action is Action.ADD:
            carrier = Item(
                user_id=job.user_id, item_id=self._ids.new_id(), type=fact.type, title=fact.title,
                content=fact.content, confidence=fact.confidence, importance=fact.importance,
                sensitivity=fact.sensitivity, is_explicit=fact.is_explicit, status=ItemStatus.ACTIVE, version=1,
                valid_from=job.occurred_at, valid_to=None, expires_at=fact.expiry(job.occurred_at),
                created_at=now, updated_at=now, conversation_id=job.conversation_id, message_id=job.message_id,
                job_id=job.job_id,
            )
        else:
            assert plan.target is not None
            known = await self._writer.get(connection, job.user_id, plan.target)
            carrier = _strengthened(known, outcome, now)
        # Closed first, so that the words of one that goes may be those of the one that comes. What was said later than
        # this turn, which came late, stays: it is the turn's own fact that is history already.
        closed = []
        for item_id in plan.superseded:
            old = await self._writer.get(connection, job.user_id, item_id)
            if old.valid_from > job.occurred_at:
                if plan.action is Action.ADD and (carrier.valid_to is None or old.valid_from < carrier.valid_to):
                    carrier = replace(
                        carrier, status=ItemStatus.SUPERSEDED, superseded_by=item_id, valid_to=old.valid_from
                    )
                continue
            closed.append(item_id)
            await self._writer.save(connection, old, replace(
                old, status=ItemStatus.SUPERSEDED, version=old.version + 1, superseded_by=carrier.item_id,
                valid_to=max(old.valid_from, job.occurred_at), updated_at=now,
            ), "superseded", *by)
        if known is None:
            await self._writer.insert(connection, carrier, outcome.vectors, "created", *by)
        else:
            operation = "merged" if plan.action is Action.MERGE else "confirmed"
            await self._writer.save(connection, known, carrier, operation, *by, vectors=outcome.merged_vectors)
        return (carrier.item_id, *closed)

    async def _merged_elsewhere(self, connection: Connection, outcome: Outcome) -> Outcome:
        """When the merged text is what another item says already, that one is kept and the target superseded by it."""
        plan = outcome.plan
        assert plan.target is not None
        old = await self._writer.get(connection, outcome.job.user_id, plan.target)
        same = await self._writer.same(connection, old.user_id, old.type, digest_of(old.type, plan.merged))
        if same is None or same.item_id == plan.target:
            return outcome
        closed = tuple(sorted({*plan.superseded, plan.target} - {same.item_id}))
        return replace(outcome, plan=Plan(Action.KEEP, same.item_id, superseded=closed))

    async def _rows(self, statement: str, arguments: Any) -> list[dict[str, Any]]:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return await (await cursor.execute(statement, arguments)).fetchall()


def _strengthened(old: Item, outcome: Outcome, now: datetime) -> Item:
    """An item that was said again: what it knows of the world grows, its protection never shrinks."""
    plan, fact, job = outcome.plan, outcome.fact, outcome.job
    expiry = fact.expiry(job.occurred_at)
    content = plan.merged if plan.action is Action.MERGE else old.content
    return replace(
        old, content=content, title=title_of("", content) if plan.action is Action.MERGE else old.title,
        confidence=max(old.confidence, fact.confidence), importance=max(old.importance, fact.importance),
        sensitivity=max(old.sensitivity, fact.sensitivity), is_explicit=old.is_explicit or fact.is_explicit,
        version=old.version + 1, updated_at=now, confirmations=old.confirmations + 1,
        expires_at=max(old.expires_at, expiry) if old.expires_at and expiry else None,
    )
