"""Conversations in PostgreSQL. What a settlement does to them is in conversation_books."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row

from llm_service.domain.call import CallRecord, CallState
from llm_service.domain.conversation import (
    Branch,
    Conversation,
    ConversationStatus,
    MessageState,
    Segment,
    StoredMessage,
    Turn,
)
from llm_service.domain.errors import ConversationNotFound
from llm_service.storage.conversation_books import conversation_of
from llm_service.storage.conversation_rows import ConversationRows, Key
from llm_service.usecases.ports import TurnEnd
from llm_service.wire.events import TURN_COMPLETED, turn_key
from servicekit.core.errors import IdempotencyConflict
from servicekit.db.database import Connection, Database

CREATE = """
INSERT INTO conversation (
    user_id, conversation_id, title, system_prompt, model, use_memories, compact_history, status, branch, length,
    branches, message_count, tokens_total, credit_micros_total, summary_branch, summary_until, created_at,
    last_message_at, idempotency_key, idempotency_hash
) VALUES (
    %(user_id)s, %(conversation_id)s, %(title)s, %(system_prompt)s, %(model)s, %(use_memories)s, %(compact_history)s,
    %(status)s, 0, 0, 1, 0, 0, 0, 0, 0, %(created_at)s, %(created_at)s, %(key)s, %(hash)s
) ON CONFLICT (user_id, idempotency_key) DO NOTHING RETURNING *
"""
BY_KEY = "SELECT * FROM conversation WHERE user_id = %s AND idempotency_key = %s AND deleted_at IS NULL"
GET = "SELECT * FROM conversation WHERE user_id = %s AND conversation_id = %s AND deleted_at IS NULL"
LOCK = GET + " FOR UPDATE"
LIST = """
SELECT * FROM conversation
WHERE user_id = %(user_id)s AND deleted_at IS NULL
    AND (%(status)s::smallint IS NULL OR status = %(status)s)
    AND (%(title)s = '' OR strpos(lower(title), lower(%(title)s)) > 0)
    AND (%(before_at)s::timestamptz IS NULL OR (last_message_at, conversation_id) < (%(before_at)s, %(before_id)s))
ORDER BY last_message_at DESC, conversation_id DESC LIMIT %(limit)s
"""
BRANCHES = "SELECT number, parent, forked_at FROM branch WHERE user_id = %s AND conversation_id = %s"
MESSAGE = "SELECT * FROM message WHERE user_id = %s AND conversation_id = %s AND message_id = %s"
# OFFSET 0: each segment is read by the primary key, whatever the planner thinks of how many rows there are.
MESSAGES = """
SELECT m.* FROM unnest(%(branches)s::int[], %(firsts)s::int[], %(ends)s::int[]) AS s (branch, first, until)
    CROSS JOIN LATERAL (
        SELECT * FROM message
        WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s AND branch = s.branch
            AND position >= s.first AND position < s.until
        ORDER BY position OFFSET 0
    ) m
ORDER BY m.position LIMIT %(limit)s
"""
ALL_MESSAGES = f"""
SELECT * FROM message
WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s AND state <> {MessageState.PENDING:d}
    AND (%(after)s::uuid IS NULL OR message_id > %(after)s)
ORDER BY message_id LIMIT %(limit)s
"""
# The newest of a conversation that never forked; asked for with the lock, before its row is read.
NEWEST = """
SELECT m.* FROM conversation c JOIN message m USING (user_id, conversation_id)
WHERE c.user_id = %s AND c.conversation_id = %s AND c.branches = 1 AND m.branch = c.branch
    AND m.position >= c.length - %s AND m.position < c.length
ORDER BY m.position
"""
MOST_NEWEST = 64
ANSWER_TO = """
SELECT * FROM message WHERE user_id = %s AND conversation_id = %s AND request_id = %s AND call_id IS NOT NULL
"""
IS_STALE = f"""
SELECT now() > %(until)s AND NOT EXISTS (
    SELECT 1 FROM call WHERE user_id = %(user_id)s AND call_id = %(call_id)s AND state = {CallState.RUNNING:d}
)
"""
DROP_TURN = """
DELETE FROM message USING conversation c
WHERE c.user_id = %(user_id)s AND c.conversation_id = %(conversation_id)s AND c.running_call_id = %(call_id)s
    AND message.user_id = c.user_id AND message.conversation_id = c.conversation_id
    AND message.branch = c.running_branch AND message.position BETWEEN c.running_first AND c.running_last
"""
DROP_FORK = """
DELETE FROM branch b USING conversation c
WHERE c.user_id = %(user_id)s AND c.conversation_id = %(conversation_id)s AND c.running_call_id = %(call_id)s
    AND b.user_id = c.user_id AND b.conversation_id = c.conversation_id
    AND b.number = c.running_branch AND b.forked_at = c.running_first
"""
RELEASE = """
UPDATE conversation SET running_call_id = NULL, running_message_id = NULL, running_request_id = NULL,
    running_branch = NULL, running_first = NULL, running_last = NULL, running_until = NULL
WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s AND running_call_id = %(call_id)s
"""
FORK = """
UPDATE conversation SET branches = branches + 1 WHERE user_id = %s AND conversation_id = %s RETURNING branches - 1
"""
ADD_BRANCH = "INSERT INTO branch (user_id, conversation_id, number, parent, forked_at) VALUES (%s, %s, %s, %s, %s)"
ADD_MESSAGE = """
INSERT INTO message (
    user_id, conversation_id, branch, position, message_id, parent_message_id, role, state, content, prompt_tokens,
    token_family, tokens_consumed, credit_micros, call_id, request_id, request_hash, finish_reason, memory_ids,
    created_at
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, 0, 0, %s, %s, %s, 0, %s, %s)
"""
RUN = """
UPDATE conversation SET running_call_id = %(call_id)s, running_message_id = %(message_id)s,
    running_request_id = %(request_id)s, running_branch = %(branch)s, running_first = %(first)s,
    running_last = %(last)s, running_until = %(until)s
WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s
"""
RUNNING_MESSAGES = """
SELECT m.* FROM message m JOIN conversation c USING (user_id, conversation_id)
WHERE c.user_id = %s AND c.conversation_id = %s AND c.running_call_id = %s AND m.branch = c.running_branch
    AND m.position BETWEEN c.running_first AND c.running_last ORDER BY m.position
"""
# The content goes; what it cost stays. `title:` and `summary:` calls have answers of their own.
ERASE_ANSWERS = """
DELETE FROM call_answer WHERE user_id = %(user_id)s AND call_id IN (
    SELECT call_id FROM call WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s::text
)
"""
ERASE_EVENTS = """
DELETE FROM outbox_message WHERE key = ANY(%(keys)s) AND event_type = %(event_type)s AND event_id IN (
    SELECT message_id::text FROM message WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s
)
"""
ERASE_MESSAGES = "DELETE FROM message WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s"
ERASE_BRANCHES = "DELETE FROM branch WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s"
ERASE_TASKS = "DELETE FROM conversation_task WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s"
ERASE = """
UPDATE conversation SET deleted_at = now(), title = '', system_prompt = '', summary = NULL, idempotency_key = NULL,
    idempotency_hash = NULL
WHERE user_id = %(user_id)s AND conversation_id = %(conversation_id)s
"""

class PostgresConversations:
    """Implements ConversationStore."""

    def __init__(self, database: Database, rows: ConversationRows) -> None:
        self._database = database
        self._rows = rows

    # Conversations

    async def create(self, conversation: Conversation, *, idempotency_key: str) -> Conversation:
        digest = repr((
            conversation.title, conversation.system_prompt, conversation.model, conversation.use_memories,
            conversation.compact_history,
        )).encode()
        arguments = {
            "user_id": conversation.user_id, "conversation_id": conversation.conversation_id,
            "title": conversation.title, "model": conversation.model, "use_memories": conversation.use_memories,
            "system_prompt": self._rows.pack_text(conversation.system_prompt, conversation.conversation_id),
            "compact_history": conversation.compact_history, "status": int(conversation.status),
            "created_at": conversation.created_at, "key": idempotency_key or None,
            "hash": hashlib.sha256(digest).digest() if idempotency_key else None,
        }
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            row = await (await cursor.execute(CREATE, arguments)).fetchone()
            if row is None:
                row = await (await cursor.execute(BY_KEY, (conversation.user_id, idempotency_key))).fetchone()
        if row is None or (row["idempotency_hash"] or b"") != (arguments["hash"] or b""):
            raise IdempotencyConflict("the idempotency_key was used before with other content")
        return self._rows.conversation(row)

    async def get(self, user_id: str, conversation_id: UUID) -> Conversation | None:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            row = await (await cursor.execute(GET, (user_id, conversation_id))).fetchone()
        return self._rows.conversation(row) if row else None

    async def list_conversations(
        self, user_id: str, *, title_contains: str, status: ConversationStatus | None,
        before: tuple[datetime, UUID] | None, limit: int,
    ) -> list[Conversation]:
        before_at, before_id = before or (None, None)
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            rows = await (await cursor.execute(LIST, {
                "user_id": user_id, "title": title_contains, "status": status and int(status),
                "before_at": before_at, "before_id": before_id, "limit": limit,
            })).fetchall()
        return [self._rows.conversation(row) for row in rows]

    async def update(self, user_id: str, conversation_id: UUID, changes: dict[str, Any]) -> Conversation | None:
        values: dict[str, Any] = {}
        for name, value in changes.items():
            if name == "system_prompt":
                values[name] = self._rows.pack_text(value, conversation_id)
            elif name == "head":
                values |= {"branch": value.branch, "length": value.position}
            else:
                values[name] = int(value) if isinstance(value, ConversationStatus) else value
        sets = ", ".join(f"{name} = %({name})s" for name in values)
        statement = f"""
            UPDATE conversation SET {sets}
            WHERE user_id = %(_user)s AND conversation_id = %(_id)s AND deleted_at IS NULL RETURNING *
        """
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            arguments = {**values, "_user": user_id, "_id": conversation_id}
            row = await (await cursor.execute(statement.encode(), arguments)).fetchone()
        return self._rows.conversation(row) if row else None

    async def delete(self, user_id: str, conversation_id: UUID) -> UUID | None:
        keys = {"user_id": user_id, "conversation_id": conversation_id, "event_type": TURN_COMPLETED,
                "keys": [user_id, turn_key(user_id, by_kafka=False)]}
        async with self._database.transaction() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            row = await (await cursor.execute(LOCK, (user_id, conversation_id))).fetchone()
            if row is None:
                raise ConversationNotFound("there is no such conversation")
            for statement in (ERASE_ANSWERS, ERASE_EVENTS, ERASE_MESSAGES, ERASE_BRANCHES, ERASE_TASKS, ERASE):
                await connection.execute(statement, keys)
        running: UUID | None = row["running_call_id"]
        return running

    # Messages

    async def branches(self, user_id: str, conversation_id: UUID) -> dict[int, Branch]:
        async with self._database.connection() as connection:
            return await _branches(connection, (user_id, conversation_id))

    async def message(self, user_id: str, conversation_id: UUID, message_id: UUID) -> StoredMessage | None:
        async with self._database.connection() as connection:
            return await _message(connection, self._rows, (user_id, conversation_id), message_id)

    async def messages(
        self, user_id: str, conversation_id: UUID, path: Sequence[Segment], *, limit: int
    ) -> list[StoredMessage]:
        async with self._database.connection() as connection:
            return await _messages(connection, self._rows, (user_id, conversation_id), path, limit=limit)

    async def all_messages(
        self, user_id: str, conversation_id: UUID, *, after: UUID | None, limit: int
    ) -> list[StoredMessage]:
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            rows = await (await cursor.execute(ALL_MESSAGES, {
                "user_id": user_id, "conversation_id": conversation_id, "after": after, "limit": limit,
            })).fetchall()
        return [self._rows.stored(row) for row in rows]

    # Turns

    @asynccontextmanager
    async def open_turn(self, user_id: str, conversation_id: UUID, request_id: str) -> AsyncIterator[_OpenTurn]:
        key = (user_id, conversation_id)
        async with self._database.transaction(pipelined=True) as connection:
            # Together, each seeing what was committed when the lock was had.
            # Not durable by itself: the call's own journal entry, which follows before a model is asked, makes it so.
            await connection.execute("SET LOCAL synchronous_commit = off")
            lock, answer, newest = (connection.cursor(row_factory=dict_row) for _ in range(3))
            await lock.execute(LOCK, key)
            await answer.execute(ANSWER_TO, (*key, request_id))
            await newest.execute(NEWEST, (*key, MOST_NEWEST))
            row = await lock.fetchone()
            if row is None:
                raise ConversationNotFound("there is no such conversation")
            conversation = self._rows.conversation(row)
            answered = await answer.fetchone()
            stale = False
            if conversation.running_call_id is not None:
                found = await (await connection.execute(IS_STALE, {
                    "until": conversation.running_until, "user_id": user_id, "call_id": conversation.running_call_id,
                })).fetchone()
                stale = bool(found and found[0])
            yield _OpenTurn(
                self._rows, connection, conversation, running_is_stale=stale,
                answer=(self._rows.stored(answered), bytes(answered["request_hash"])) if answered else None,
                newest=[self._rows.stored(each) for each in await newest.fetchall()],
            )

    async def undo_turn(self, turn: Turn, call_id: UUID) -> None:
        keys = {"user_id": turn.user_id, "conversation_id": turn.conversation_id, "call_id": call_id}
        async with self._database.transaction() as connection:
            await connection.execute(LOCK, (turn.user_id, turn.conversation_id))
            for statement in (DROP_TURN, DROP_FORK, RELEASE):
                await connection.execute(statement, keys)

    async def abandoned_turn(self, record: CallRecord) -> TurnEnd | None:
        conversation_id = conversation_of(record)
        if conversation_id is None:
            return None
        user_id = record.billing.user_id
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            rows = await (
                await cursor.execute(RUNNING_MESSAGES, (user_id, conversation_id, record.call_id))
            ).fetchall()
            row = await (await cursor.execute(GET, (user_id, conversation_id))).fetchone()
        if not rows or row is None:
            return None
        sent, answer = [self._rows.stored(each) for each in rows[:-1]], self._rows.stored(rows[-1])
        turn = Turn(
            user_id, conversation_id, answer.message_id, tuple(sent), asked=tuple(sent), memory_ids=answer.memory_ids,
            remembers=row["use_memories"],
        )
        return TurnEnd(turn, answer.message, answer.prompt_tokens, answer.token_family)

class _OpenTurn:
    """Implements OpenTurn."""

    def __init__(
        self, rows: ConversationRows, connection: Connection, conversation: Conversation, *, running_is_stale: bool,
        answer: tuple[StoredMessage, bytes] | None, newest: Sequence[StoredMessage],
    ) -> None:
        self._rows = rows
        self._connection = connection
        self.conversation = conversation
        self.running_is_stale = running_is_stale
        self.answer = answer
        self._newest = newest
        self._key = (conversation.user_id, conversation.conversation_id)

    async def message(self, message_id: UUID) -> StoredMessage | None:
        return await _message(self._connection, self._rows, self._key, message_id)

    async def branches(self) -> dict[int, Branch]:
        return await _branches(self._connection, self._key) if self.conversation.branches > 1 else {}

    async def messages(self, path: Sequence[Segment]) -> list[StoredMessage]:
        most = sum(each.end - each.first for each in path)
        if len(path) == 1 and self.conversation.branches == 1 and self._newest and (
            path[0].branch == self._newest[0].place.branch and path[0].first >= self._newest[0].place.position
        ):
            return [each for each in self._newest if path[0].first <= each.place.position < path[0].end]
        return await _messages(self._connection, self._rows, self._key, path, limit=most)

    async def drop_stale(self) -> None:
        keys = {
            "user_id": self._key[0], "conversation_id": self._key[1], "call_id": self.conversation.running_call_id
        }
        for statement in (DROP_TURN, DROP_FORK, RELEASE):
            await self._connection.execute(statement, keys)

    async def fork(self, *, parent: int, at: int) -> int:
        row = await (await self._connection.execute(FORK, self._key)).fetchone()
        assert row is not None
        await self._connection.execute(ADD_BRANCH, (*self._key, row[0], parent, at))
        return int(row[0])

    async def begin(
        self, sent: Sequence[StoredMessage], answer: StoredMessage, *, call_id: UUID, fingerprint: bytes,
        until: datetime,
    ) -> None:
        rows = [self._rows.to_row(self._key, each) for each in sent]
        rows.append(self._rows.to_row(self._key, answer, call_id=call_id, fingerprint=fingerprint))
        first = sent[0] if sent else answer
        for row in rows:
            await self._connection.execute(ADD_MESSAGE, row)
        await self._connection.execute(RUN, {
            "user_id": self._key[0], "conversation_id": self._key[1], "call_id": call_id,
            "message_id": answer.message_id, "request_id": answer.request_id, "branch": answer.place.branch,
            "first": first.place.position, "last": answer.place.position, "until": until,
        })


async def _branches(connection: Connection, key: Key) -> dict[int, Branch]:
    rows = await (await connection.execute(BRANCHES, key)).fetchall()
    return {number: Branch(number, parent, forked_at) for number, parent, forked_at in rows}


async def _message(
    connection: Connection, rows: ConversationRows, key: Key, message_id: UUID
) -> StoredMessage | None:
    cursor = connection.cursor(row_factory=dict_row)
    row = await (await cursor.execute(MESSAGE, (*key, message_id))).fetchone()
    return rows.stored(row) if row and row["state"] != MessageState.PENDING else None


async def _messages(
    connection: Connection, rows: ConversationRows, key: Key, path: Sequence[Segment], *, limit: int
) -> list[StoredMessage]:
    if not path:
        return []
    cursor = connection.cursor(row_factory=dict_row)
    found = await (await cursor.execute(MESSAGES, {
        "user_id": key[0], "conversation_id": key[1], "limit": limit,
        "branches": [each.branch for each in path], "firsts": [each.first for each in path],
        "ends": [each.end for each in path],
    })).fetchall()
    return [rows.stored(row) for row in found]
