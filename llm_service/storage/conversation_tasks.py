"""What is done for conversations in the background, and whether their totals agree with their calls."""

from __future__ import annotations

from datetime import timedelta

from llm_service.domain.call import CallState
from llm_service.domain.conversation import Place
from llm_service.storage.conversation_rows import ConversationRows
from llm_service.usecases.conversation_ports import ConversationTask, TaskKind
from servicekit.db.database import Database

TITLE_IF_NONE = """
UPDATE conversation SET title = %s
WHERE user_id = %s AND conversation_id = %s AND title = '' AND deleted_at IS NULL
"""
SET_SUMMARY = """
UPDATE conversation SET summary = %s, summary_branch = %s, summary_until = %s
WHERE user_id = %s AND conversation_id = %s AND deleted_at IS NULL
"""
# SKIP LOCKED: replicas share the work; the time of the next try is the lease.
CLAIM_TASKS = """
UPDATE conversation_task SET due_at = now() + %(lease)s, tries = tries + 1
WHERE (user_id, conversation_id, kind) IN (
    SELECT user_id, conversation_id, kind FROM conversation_task WHERE due_at <= now()
    ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
) RETURNING user_id, conversation_id, kind, tries, branch, until
"""
DONE = "DELETE FROM conversation_task WHERE user_id = %s AND conversation_id = %s AND kind = %s"
POSTPONE = """
UPDATE conversation_task SET due_at = now() + %s WHERE user_id = %s AND conversation_id = %s AND kind = %s
"""
# A deleted conversation, too, keeps what it cost. Only those at rest are compared.
MISMATCHES = f"""
SELECT c.user_id, c.conversation_id, c.tokens_total, c.credit_micros_total, s.tokens, s.micros
FROM (
    SELECT * FROM conversation WHERE last_message_at BETWEEN now() - interval '1 day' AND now() - interval '1 minute'
    ORDER BY last_message_at DESC LIMIT %s
) c CROSS JOIN LATERAL (
    SELECT coalesce(sum(input_tokens + output_tokens), 0) AS tokens, coalesce(sum(credit_micros), 0) AS micros
    FROM call WHERE user_id = c.user_id AND conversation_id = c.conversation_id::text
        AND conversation_id <> '' AND state = {CallState.SETTLED:d}
) s
WHERE c.tokens_total <> s.tokens OR c.credit_micros_total <> s.micros
"""
TASK_LEASE = timedelta(seconds=15)
"""Should a model take longer, a second try finds the same request in flight and is put off."""


class PostgresConversationTasks:
    """Implements ConversationTasks."""

    def __init__(self, database: Database, rows: ConversationRows) -> None:
        self._database = database
        self._rows = rows

    async def claim(self, *, limit: int) -> list[ConversationTask]:
        async with self._database.connection() as connection:
            rows = await (await connection.execute(CLAIM_TASKS, {"lease": TASK_LEASE, "limit": limit})).fetchall()
        return [
            ConversationTask(user_id, conversation_id, TaskKind(kind), tries, Place(branch, until))
            for user_id, conversation_id, kind, tries, branch, until in rows
        ]

    async def done(self, task: ConversationTask) -> None:
        async with self._database.connection() as connection:
            await connection.execute(DONE, (task.user_id, task.conversation_id, int(task.kind)))

    async def postpone(self, task: ConversationTask, *, seconds: float) -> None:
        async with self._database.connection() as connection:
            await connection.execute(
                POSTPONE, (timedelta(seconds=seconds), task.user_id, task.conversation_id, int(task.kind))
            )

    async def set_title(self, task: ConversationTask, title: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(TITLE_IF_NONE, (title, task.user_id, task.conversation_id))
            await connection.execute(DONE, (task.user_id, task.conversation_id, int(task.kind)))

    async def set_summary(self, task: ConversationTask, summary: str) -> None:
        packed = self._rows.pack_text(summary, task.conversation_id)
        async with self._database.transaction() as connection:
            await connection.execute(
                SET_SUMMARY, (packed, task.place.branch, task.place.position, task.user_id, task.conversation_id)
            )
            await connection.execute(DONE, (task.user_id, task.conversation_id, int(task.kind)))

    async def mismatches(self, *, most: int) -> int:
        """How many of the conversations last used do not agree with their calls."""
        async with self._database.connection() as connection:
            return len(await (await connection.execute(MISMATCHES, (most,))).fetchall())
