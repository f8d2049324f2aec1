"""Jobs and model answers in PostgreSQL."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
from psycopg.rows import dict_row

from memory_worker.domain.job import Job, JobState, Said, TurnText
from memory_worker.usecases.ports import LeaseLost, ModelAnswer, Turn
from servicekit.core.ids import IdSource
from servicekit.core.offsets import OffsetMove
from servicekit.db.database import Database
from servicekit.kafka.offsets import move_offsets

SPACING_MILLISECONDS = 20
"""Between the jobs of one user, which are worked one after the other anyway, so that thousands of them do not
stand before everybody else's."""
SUBMIT = f"""
INSERT INTO job (
    user_id, job_id, conversation_id, message_id, state, tries, reason, turn, occurred_at, created_at, due_at, owner,
    generation, calls, tokens, credit_micros
)
SELECT user_id, job_id, conversation_id, message_id, {JobState.QUEUED:d}, 0, '', turn, occurred_at, now(),
    now() + {SPACING_MILLISECONDS} * interval '1 millisecond' * (
        row_number() OVER (PARTITION BY user_id ORDER BY occurred_at, message_id) - 1
        + (SELECT count(*) FROM job o WHERE o.user_id = d.user_id AND o.due_at IS NOT NULL)
    ), '', 0, 0, 0, 0
FROM json_to_recordset(%(turns)s::json) AS d (
    user_id text, job_id uuid, conversation_id text, message_id text, turn jsonb, occurred_at timestamptz
)
WHERE NOT EXISTS (
    SELECT 1 FROM erased_user e
    WHERE e.user_hash = sha256(convert_to(d.user_id, 'UTF8')) AND e.erased_at >= d.occurred_at
)
ORDER BY user_id, message_id ON CONFLICT (user_id, message_id) DO NOTHING RETURNING job_id
"""
KNOWN = """
SELECT j.user_id, j.message_id, j.job_id FROM unnest(%(users)s::text[], %(messages)s::text[]) AS d (user_id, message_id)
    JOIN job j USING (user_id, message_id)
"""
# One job a user at a time, in the order in which things were said, and of many users those who waited longest: nobody
# starves the others. A job whose lease ran out is due again. SKIP LOCKED: workers share what there is.
CLAIM = f"""
UPDATE job SET state = {JobState.RUNNING:d}, owner = %(owner)s, due_at = now() + %(lease)s, tries = tries + 1
WHERE (user_id, job_id) IN (
    SELECT user_id, job_id FROM job
    WHERE (user_id, job_id) IN (
        SELECT DISTINCT ON (user_id) user_id, job_id FROM (
            SELECT user_id, job_id, occurred_at FROM job WHERE due_at <= now() ORDER BY due_at LIMIT %(window)s
        ) due
        WHERE NOT EXISTS (
            SELECT 1 FROM job r WHERE r.user_id = due.user_id AND r.state = {JobState.RUNNING:d} AND r.due_at > now()
        )
        ORDER BY user_id, occurred_at, job_id
    ) AND due_at <= now()
    ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
) RETURNING *, EXISTS (
    SELECT 1 FROM decision d WHERE d.user_id = job.user_id AND d.job_id = job.job_id
) AS has_decisions
"""
BEAT = f"""
UPDATE job SET due_at = now() + %(lease)s
WHERE owner = %(owner)s AND job_id = ANY(%(jobs)s) AND state = {JobState.RUNNING:d}
"""
FINISH = f"""
UPDATE job SET state = %(state)s, reason = %(reason)s, owner = '', due_at = now() + %(wait)s::interval,
    ended_at = CASE WHEN %(ends)s THEN now() END, turn = CASE WHEN %(forget)s THEN NULL ELSE turn END,
    generation = generation + %(generation)s
WHERE user_id = %(user_id)s AND job_id = %(job_id)s AND owner = %(owner)s AND state = {JobState.RUNNING:d}
    AND NOT (%(ends)s AND EXISTS (
        SELECT 1 FROM model_answer a WHERE a.user_id = %(user_id)s AND a.job_id = %(job_id)s AND a.answered_at IS NULL
    ))
"""
UNANSWERED = """
SELECT call_key FROM model_answer WHERE user_id = %s AND job_id = %s AND answered_at IS NULL ORDER BY call_key
"""
GET = "SELECT * FROM job WHERE job_id = %(job_id)s AND (%(user_id)s = '' OR user_id = %(user_id)s)"
LIST = """
SELECT * FROM job WHERE user_id = %(user_id)s AND (%(state)s::smallint IS NULL OR state = %(state)s)
    AND (%(before)s::uuid IS NULL OR job_id < %(before)s)
ORDER BY job_id DESC LIMIT %(limit)s
"""
RETRY = f"""
UPDATE job SET state = {JobState.QUEUED:d}, tries = 0, reason = '', due_at = now(), ended_at = NULL,
    generation = generation + CASE WHEN state = {JobState.DEAD:d} THEN 1 ELSE 0 END
WHERE job_id = %s AND state IN ({JobState.DEAD:d}, {JobState.WAITING_FOR_CREDIT:d}, {JobState.QUEUED:d})
RETURNING *
"""
# Only while there is such a job: nothing is written of a user who is erased meanwhile.
BEGIN_ANSWER = """
WITH asked AS (
    INSERT INTO model_answer (user_id, call_key, job_id, stage, answer, tokens, credit_micros, call_id)
    SELECT user_id, %(key)s, job_id, %(stage)s, '', 0, 0, '' FROM job
    WHERE user_id = %(user_id)s AND job_id = %(job_id)s FOR KEY SHARE
    ON CONFLICT DO NOTHING
)
SELECT answer, tokens, credit_micros, call_id FROM model_answer
WHERE user_id = %(user_id)s AND call_key = %(key)s AND answered_at IS NOT NULL
"""
KEEP_ANSWER = """
WITH kept AS (
    UPDATE model_answer SET answer = %(answer)s, tokens = %(tokens)s, credit_micros = %(micros)s,
        call_id = %(call_id)s, answered_at = now()
    WHERE user_id = %(user_id)s AND call_key = %(key)s AND answered_at IS NULL RETURNING user_id
)
UPDATE job SET calls = calls + 1, tokens = tokens + %(tokens)s, credit_micros = credit_micros + %(micros)s
FROM kept WHERE job.user_id = kept.user_id AND job.job_id = %(job_id)s
"""
FORGET_ANSWER = "DELETE FROM model_answer WHERE user_id = %s AND call_key = %s AND answered_at IS NULL"
WINDOW = 20


class PostgresJobs:
    """Implements JobQueue and AnswerJournal."""

    def __init__(self, database: Database, ids: IdSource) -> None:
        self._database = database
        self._ids = ids

    async def submit(
        self, turns: Sequence[Turn], moves: Sequence[OffsetMove] = ()
    ) -> list[tuple[UUID | None, bool]]:
        rows = [
            {
                "user_id": each.user_id, "job_id": str(self._ids.new_id()), "conversation_id": each.conversation_id,
                "message_id": each.message_id, "turn": turn_to_json(each.text), "occurred_at": each.occurred_at,
            }
            for each in turns
        ]
        keys = {"users": [each.user_id for each in turns], "messages": [each.message_id for each in turns]}
        async with self._database.transaction() as connection:
            made = await (await connection.execute(SUBMIT, {"turns": orjson.dumps(rows).decode()})).fetchall()
            known = await (await connection.execute(KNOWN, keys)).fetchall()
            if moves:
                await move_offsets(connection, moves)
        new = {job_id for (job_id,) in made}
        jobs = {(user_id, message_id): job_id for user_id, message_id, job_id in known}
        results: list[tuple[UUID | None, bool]] = []
        for each in turns:
            job_id = jobs.get((each.user_id, each.message_id))
            results.append((job_id, job_id is not None and job_id not in new))
            new.discard(job_id)
        return results

    async def claim(self, owner: str, *, limit: int, lease: timedelta) -> list[Job]:
        arguments = {"owner": owner, "limit": limit, "lease": lease, "window": limit * WINDOW}
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return [job_from_row(row) for row in await (await cursor.execute(CLAIM, arguments)).fetchall()]

    async def beat(self, owner: str, job_ids: Sequence[UUID], *, lease: timedelta) -> None:
        async with self._database.connection() as connection:
            await connection.execute(BEAT, {"owner": owner, "jobs": list(job_ids), "lease": lease})

    async def finish(
        self, job: Job, owner: str, state: JobState, *, reason: str = "", next_try_in: timedelta | None = None,
        new_generation: bool = False,
    ) -> bool:
        async with self._database.connection() as connection:
            done = await connection.execute(FINISH, {
                "state": int(state), "reason": reason[:200], "wait": next_try_in, "owner": owner,
                "ends": state in (JobState.DONE, JobState.DEAD), "forget": state is JobState.DONE,
                "user_id": job.user_id, "job_id": job.job_id, "generation": int(new_generation),
            })
        if done.rowcount != 1:
            if await self.unanswered(job):
                return False
            raise LeaseLost
        return True

    async def get(self, job_id: UUID, user_id: str) -> Job | None:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            row = await (await cursor.execute(GET, {"job_id": job_id, "user_id": user_id})).fetchone()
        return job_from_row(row) if row else None

    async def list_jobs(
        self, user_id: str, *, state: JobState | None, before: UUID | None, limit: int
    ) -> list[Job]:
        arguments = {"user_id": user_id, "state": state and int(state), "before": before, "limit": limit}
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return [job_from_row(row) for row in await (await cursor.execute(LIST, arguments)).fetchall()]

    async def retry(self, job_id: UUID) -> Job | None:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            row = await (await cursor.execute(RETRY, (job_id,))).fetchone()
        return job_from_row(row) if row else None

    async def begin(self, job: Job, key: str, stage: str) -> ModelAnswer | None:
        arguments = {"user_id": job.user_id, "key": key, "job_id": job.job_id, "stage": stage}
        async with self._database.connection() as connection:
            row = await (await connection.execute(BEGIN_ANSWER, arguments)).fetchone()
        return ModelAnswer(*row) if row else None

    async def keep(self, job: Job, key: str, answer: ModelAnswer) -> None:
        async with self._database.connection() as connection:
            await connection.execute(KEEP_ANSWER, {
                "user_id": job.user_id, "key": key, "job_id": job.job_id, "answer": answer.text,
                "tokens": answer.tokens, "micros": answer.credit_micros, "call_id": answer.call_id,
            })

    async def unanswered(self, job: Job) -> list[str]:
        async with self._database.connection() as connection:
            rows = await (await connection.execute(UNANSWERED, (job.user_id, job.job_id))).fetchall()
        return [key for (key,) in rows]

    async def forget(self, job: Job, key: str) -> None:
        async with self._database.connection() as connection:
            await connection.execute(FORGET_ANSWER, (job.user_id, key))


def turn_to_json(text: TurnText) -> dict[str, Any]:
    return {
        "said": [[each.role, each.text] for each in text.said],
        "context": [[each.role, each.text] for each in text.context], "memory_ids": list(text.memory_ids),
        "traceparent": text.traceparent, "sealed": base64.b64encode(text.sealed).decode(),
    }


def turn_from_json(value: dict[str, Any] | None) -> TurnText:
    if not value:
        return TurnText(())
    return TurnText(
        tuple(Said(*each) for each in value["said"]), tuple(Said(*each) for each in value["context"]),
        tuple(value["memory_ids"]), value["traceparent"], base64.b64decode(value.get("sealed", "")),
    )


def job_from_row(row: dict[str, Any]) -> Job:
    state = JobState(row["state"])
    return Job(
        user_id=row["user_id"], job_id=row["job_id"], conversation_id=row["conversation_id"],
        message_id=row["message_id"], state=state, tries=row["tries"], occurred_at=row["occurred_at"],
        created_at=row["created_at"], turn=turn_from_json(row["turn"]), reason=row["reason"],
        next_try_at=row["due_at"] if state in (JobState.QUEUED, JobState.WAITING_FOR_CREDIT) else None,
        ended_at=row["ended_at"], generation=row["generation"], calls=row["calls"], tokens=row["tokens"],
        credit_micros=row["credit_micros"], has_decisions=row.get("has_decisions", True),
    )
