"""The durable record of calls. A batch of settlements is one statement, and so one transaction and one commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

import orjson
import psycopg
from psycopg.rows import dict_row

from llm_service.domain.call import CallRecord, CallState, unknown_outcome
from llm_service.domain.errors import SecretKeyMissing
from llm_service.storage import conversation_books, tables
from llm_service.storage.call_rows import attempt_from_row, attempt_to_row, call_from_row, call_to_row
from llm_service.storage.sealed_keys import KeySealer
from llm_service.usecases.ports import ExpiredHold, Heartbeat, Settlement, StoredAnswer
from metering.usage import UsageSource
from servicekit.batching import MicroBatcher
from servicekit.core.backoff import Backoff
from servicekit.core.errors import DependencyUnavailable
from servicekit.db.database import Database, is_transient
from servicekit.outbox.message import lane_of
from servicekit.outbox.table import INSERT_COLUMNS
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

SETTLE_SECONDS = 60.0
"""How long a settlement is tried again while the database is away; afterwards the call's hold expires, and the sweeper
writes an unknown outcome."""
MOST_SETTLEMENTS = 200
LINGER_SECONDS = 0.004

_TYPES = {
    "SMALLINT": "smallint", "INTEGER": "integer", "BIGINT": "bigint", "BOOLEAN": "boolean", "TEXT": "text",
    "JSONB": "jsonb", "UUID": "uuid",
}


def _type_of(column: Any) -> str:
    name = type(column.type).__name__.upper()
    return {"DATETIME": "timestamptz", "SMALLINTEGER": "smallint", "BIGINTEGER": "bigint"}.get(name) or _TYPES[name]


def _record_columns(table: Any, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_type_of(table.c[name])}" for name in names)


CALL_COLUMNS = [name for name in tables.call.columns.keys() if name not in ("lease_until", "cancel_asked")]
ATTEMPT_COLUMNS = list(tables.attempt.columns.keys())
_CALLS = ", ".join(CALL_COLUMNS)
_ATTEMPTS = ", ".join(ATTEMPT_COLUMNS)
_END_COLUMNS = [name for name in CALL_COLUMNS if name not in ("user_id", "call_id", "created_at")]

# Settles RUNNING calls and those nobody knew the outcome of; whoever settled first stays. The charge event goes out
# with those that are settled here, and only with them.
_SETTLE = f"""
WITH data AS MATERIALIZED (
    SELECT * FROM json_to_recordset(%(calls)s::json) AS d (
        {_record_columns(tables.call, CALL_COLUMNS)}, ordinal integer, lane smallint, topic text, event_type text,
        payload text, answer text, traceparent text, {conversation_books.RECORD_COLUMNS}
    )
), settled AS (
    INSERT INTO call AS c ({_CALLS}) SELECT {_CALLS} FROM data
    ON CONFLICT (user_id, call_id) DO UPDATE SET
        {', '.join(f'{name} = excluded.{name}' for name in _END_COLUMNS)}, lease_until = NULL
    WHERE c.state IN ({CallState.RUNNING:d}, {CallState.UNKNOWN_OUTCOME:d})
    RETURNING c.user_id, c.call_id
), tried AS (
    INSERT INTO attempt ({_ATTEMPTS})
    SELECT {', '.join('a.' + name for name in ATTEMPT_COLUMNS)}
    FROM json_to_recordset(%(attempts)s::json) AS a ({_record_columns(tables.attempt, ATTEMPT_COLUMNS)})
        JOIN settled USING (user_id, call_id)
    ON CONFLICT DO NOTHING
), kept AS (
    INSERT INTO call_answer (user_id, call_id, answer)
    SELECT user_id, call_id, decode(answer, 'hex') FROM data JOIN settled USING (user_id, call_id)
    WHERE answer IS NOT NULL
), sent AS (
    INSERT INTO outbox_message ({INSERT_COLUMNS}, traceparent)
    SELECT lane, user_id, call_id::text, event_type, topic, decode(payload, 'hex'), coalesce(traceparent, '')
    FROM data JOIN settled USING (user_id, call_id) WHERE payload IS NOT NULL ORDER BY ordinal
)
"""
SETTLE = _SETTLE + "SELECT call_id FROM settled"
SETTLE_TURNS = _SETTLE + conversation_books.SETTLE + "SELECT call_id FROM settled"
"""For batches with a conversation's call in them."""
# The late truth about a call that a sweeper had to settle by its last checkpoint: its record, and the event that books
# the difference, once.
CORRECT = f"""
WITH data AS MATERIALIZED (
    SELECT * FROM json_to_recordset(%(calls)s::json) AS d (
        {_record_columns(tables.call, CALL_COLUMNS)}, lane smallint, topic text, event_type text, payload text,
        event_id text, traceparent text, conversation uuid, more_tokens bigint, more_micros bigint
    )
), corrected AS (
    UPDATE call AS c SET {', '.join(f'{name} = data.{name}' for name in _END_COLUMNS if name != 'swept')}
    FROM data WHERE c.user_id = data.user_id AND c.call_id = data.call_id
        AND c.state = {CallState.SETTLED:d} AND c.swept AND c.usage_source = {UsageSource.ESTIMATED:d}
    RETURNING c.user_id, c.call_id
), sent AS (
    INSERT INTO outbox_message ({INSERT_COLUMNS}, traceparent)
    SELECT lane, user_id, event_id, event_type, topic, decode(payload, 'hex'), coalesce(traceparent, '')
    FROM data JOIN corrected USING (user_id, call_id)
), {conversation_books.CORRECT}
SELECT call_id FROM corrected
"""
BEAT = f"""
INSERT INTO call AS c ({_CALLS}, lease_until)
SELECT {_CALLS}, now() + %(lease)s
FROM json_to_recordset(%(calls)s::json) AS d ({_record_columns(tables.call, CALL_COLUMNS)})
ON CONFLICT (user_id, call_id) DO UPDATE SET
    lease_until = excluded.lease_until, input_tokens = excluded.input_tokens, output_tokens = excluded.output_tokens,
    upstream_model = excluded.upstream_model, first_token_at = excluded.first_token_at
WHERE c.state = {CallState.RUNNING:d}
RETURNING c.call_id, c.cancel_asked
"""
FIND = "SELECT * FROM call WHERE call_id = %(call_id)s AND (%(user_id)s = '' OR user_id = %(user_id)s)"
FIND_OWN = "SELECT * FROM call WHERE user_id = %(user_id)s AND call_id = %(call_id)s"
FIND_BY_REQUEST = """
SELECT * FROM call WHERE user_id = %(user_id)s AND request_id = %(request_id)s ORDER BY created_at DESC LIMIT 1
"""
ATTEMPTS_OF = """
SELECT * FROM attempt WHERE (user_id, call_id) IN (SELECT * FROM unnest(%(users)s::text[], %(calls)s::uuid[]))
ORDER BY call_id, number
"""
LIST = """
SELECT * FROM call
WHERE user_id = %(user_id)s
    AND (%(conversation_id)s = '' OR conversation_id = %(conversation_id)s)
    AND (%(state)s::smallint IS NULL OR state = %(state)s)
    AND (%(before_at)s::timestamptz IS NULL OR (created_at, call_id) < (%(before_at)s, %(before_id)s))
ORDER BY created_at DESC, call_id DESC LIMIT %(limit)s
"""
ANSWER = "SELECT answer FROM call_answer WHERE user_id = %s AND call_id = %s"
ASK_TO_CANCEL = f"""
UPDATE call SET cancel_asked = true WHERE user_id = %s AND call_id = %s AND state = {CallState.RUNNING:d}
"""
# SKIP LOCKED: several sweepers share the work; the lease keeps a call from being claimed twice.
CLAIM = f"""
UPDATE call SET lease_until = now() + %(lease)s
WHERE (user_id, call_id) IN (
    SELECT user_id, call_id FROM call WHERE state = {CallState.RUNNING:d} AND lease_until < now()
    ORDER BY lease_until LIMIT %(limit)s FOR UPDATE SKIP LOCKED
) RETURNING *
"""
ADD_UNKNOWN = f"""
INSERT INTO call ({_CALLS})
SELECT {_CALLS} FROM json_to_recordset(%(calls)s::json) AS d ({_record_columns(tables.call, CALL_COLUMNS)})
ON CONFLICT (user_id, call_id) DO NOTHING
"""
CURSOR = "SELECT moved_to FROM sweep_cursor WHERE name = 'expired_holds'"
MOVE_CURSOR = """
INSERT INTO sweep_cursor (name, moved_to) VALUES ('expired_holds', %s)
ON CONFLICT (name) DO UPDATE SET moved_to = greatest(sweep_cursor.moved_to, excluded.moved_to)
"""
PRUNE_ANSWERS = "DELETE FROM call_answer WHERE stored_at < %s"


class EventMaker(Protocol):
    """Makes the charge event of a settled call: its id, type, topic and bytes."""

    def __call__(self, record: CallRecord, *, corrects: bool = False) -> tuple[str, str, str, bytes]: ...


class PostgresCallJournal:
    """Implements CallJournal. `event_of` makes a settled call's charge event, or its correction; `wake_relay` is told
    of every commit that added one; a running call whose heartbeat is older than `lease` is taken for dead. Answers are
    kept sealed."""

    def __init__(
        self, writing: Database, reading: Database, *, event_of: EventMaker, sealer: KeySealer,
        answer_to_bytes: Callable[[StoredAnswer], bytes], answer_from_bytes: Callable[[bytes], StoredAnswer],
        turns: conversation_books.TurnRows, wake_relay: Callable[[], None], lease: timedelta,
    ) -> None:
        self._writing = writing
        self._reading = reading
        self._event_of = event_of
        self._sealer = sealer
        self._answer_to_bytes = answer_to_bytes
        self._answer_from_bytes = answer_from_bytes
        self._turns = turns
        self._wake_relay = wake_relay
        self._lease = lease
        self._settling: MicroBatcher[Settlement, CallRecord] = MicroBatcher(
            self._settle_batch, name="settlements", most_items=MOST_SETTLEMENTS, linger_seconds=LINGER_SECONDS
        )

    async def settle(self, settlement: Settlement) -> CallRecord:
        return await self._settling.submit(settlement)

    async def close(self) -> None:
        await self._settling.close()

    async def _settle_batch(self, settlements: Sequence[Settlement]) -> Sequence[CallRecord | Exception]:
        # A process that was stalled may sweep a call of its own while it settles it: the first of a batch counts.
        first: dict[UUID, Settlement] = {}
        for each in settlements:
            first.setdefault(each.record.call_id, each)
        arguments = {
            "calls": orjson.dumps([self._row_of(each, number) for number, each in enumerate(first.values())]).decode(),
            "attempts": orjson.dumps([
                attempt_to_row(each.record, attempt) for each in first.values() for attempt in each.record.attempts
            ]).decode(),
        }
        has_turns = any(each.record.billing.conversation_id for each in settlements)
        settled = await self._run_until_it_works(SETTLE_TURNS if has_turns else SETTLE, arguments)
        self._wake_relay()
        results: list[CallRecord | Exception] = []
        for each in settlements:
            record = each.record
            if record.call_id not in settled or first[record.call_id] is not each:
                # Somebody settled it before: a sweeper, or this very statement whose answer was lost.
                record = await self._settled_before(each)
            results.append(record)
        return results

    async def _settled_before(self, settlement: Settlement) -> CallRecord:
        """What is recorded; when that is only a sweeper's estimate, the difference to the truth is booked."""
        record = settlement.record
        known = await self.find(record.call_id, record.billing.user_id)
        is_estimate = (
            known is not None and known.swept and known.state is CallState.SETTLED
            and known.usage.source is UsageSource.ESTIMATED
        )
        if known is None or not is_estimate or record.state is not CallState.SETTLED or known.usage == record.usage:
            return known or record
        truth = replace(record, usage=replace(record.usage, source=UsageSource.CORRECTED), swept=True)
        event_id, event_type, topic, payload = self._event_of(truth, corrects=True)
        row = call_to_row(truth) | {
            "lane": lane_of(record.billing.user_id), "topic": topic, "event_type": event_type, "event_id": event_id,
            "payload": payload.hex(), "traceparent": settlement.traceparent,
            **conversation_books.correction_to_row(known, truth),
        }
        async with self._writing.raw_connection() as connection:
            await connection.execute(CORRECT, {"calls": orjson.dumps([row]).decode()})
        self._wake_relay()
        log.warning("settlement_corrected", call_id=str(record.call_id))
        return truth

    async def _run_until_it_works(self, statement: str, arguments: Mapping[str, str]) -> set[UUID]:
        backoff = Backoff(first_seconds=0.05, most_seconds=2.0)
        give_up_at = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while True:
            try:
                async with self._writing.raw_connection() as connection:
                    cursor = await connection.execute(statement, arguments, binary=True)
                    return {call_id for (call_id,) in await cursor.fetchall()}
            except Exception as error:
                if not is_transient(error):
                    raise
                seconds = backoff.next_seconds()
                log.warning("settlement_try_again", kind=type(error).__name__, next_try_seconds=round(seconds, 2))
                if asyncio.get_running_loop().time() + seconds > give_up_at:
                    raise DependencyUnavailable("PostgreSQL") from error
                await asyncio.sleep(seconds)

    def _row_of(self, settlement: Settlement, ordinal: int) -> dict[str, Any]:
        record = settlement.record
        row = call_to_row(record)
        row["ordinal"] = ordinal
        if record.state is CallState.SETTLED:
            _, event_type, topic, payload = self._event_of(record)
            row.update(
                lane=lane_of(record.billing.user_id), topic=topic, event_type=event_type, payload=payload.hex(),
                traceparent=settlement.traceparent,
            )
        if settlement.answer is not None:
            data = self._answer_to_bytes(settlement.answer)
            row["answer"] = self._sealer.seal_bytes(data, bound_to=str(record.call_id)).hex()
        if record.billing.conversation_id:
            row |= self._turns.settlement_to_row(settlement)
        return row

    async def beat(self, running: Sequence[Heartbeat]) -> set[UUID]:
        calls = orjson.dumps([call_to_row(each.record) for each in running]).decode()
        async with self._writing.connection() as connection:
            cursor = await connection.execute(BEAT, {"calls": calls, "lease": self._lease})
            asked = {call_id for call_id, cancel_asked in await cursor.fetchall() if cancel_asked}
            if turns := [self._turns.so_far_to_row(each) for each in running if each.turn_end is not None]:
                await connection.execute(conversation_books.KEEP_SO_FAR, {"turns": orjson.dumps(turns).decode()})
        return asked

    async def find(self, call_id: UUID, user_id: str) -> CallRecord | None:
        found = await self._calls(FIND_OWN if user_id else FIND, {"call_id": call_id, "user_id": user_id})
        return found[0] if found else None

    async def find_by_request(self, user_id: str, request_id: str) -> CallRecord | None:
        found = await self._calls(FIND_BY_REQUEST, {"user_id": user_id, "request_id": request_id})
        return found[0] if found else None

    async def list_calls(
        self, user_id: str, *, conversation_id: str, state: CallState | None,
        before: tuple[datetime, UUID] | None, limit: int,
    ) -> list[CallRecord]:
        before_at, before_id = before or (None, None)
        return await self._calls(LIST, {
            "user_id": user_id, "conversation_id": conversation_id, "state": state and int(state),
            "before_at": before_at, "before_id": before_id, "limit": limit,
        })

    async def answer_of(self, user_id: str, call_id: UUID) -> StoredAnswer | None:
        async with self._reading.connection() as connection:
            row = await (await connection.execute(ANSWER, (user_id, call_id))).fetchone()
        if row is None:
            return None
        try:
            return self._answer_from_bytes(self._sealer.open_bytes(row[0], bound_to=str(call_id)))
        except SecretKeyMissing:
            log.warning("answer_not_opened", call_id=str(call_id))
            return None

    async def ask_to_cancel(self, user_id: str, call_id: UUID) -> None:
        async with self._reading.connection() as connection:
            await connection.execute(ASK_TO_CANCEL, (user_id, call_id))

    async def claim_abandoned(self, *, limit: int) -> list[CallRecord]:
        return await self._calls(CLAIM, {"lease": self._lease, "limit": limit}, with_attempts=False)

    async def add_unknown_outcomes(self, holds: Sequence[ExpiredHold]) -> int:
        calls = orjson.dumps([call_to_row(unknown_outcome_of(hold)) for hold in holds]).decode()
        async with self._writing.connection() as connection:
            cursor: psycopg.AsyncCursor[Any] = await connection.execute(ADD_UNKNOWN, {"calls": calls})
            return cursor.rowcount

    async def sweep_cursor(self) -> datetime | None:
        async with self._reading.connection() as connection:
            row = await (await connection.execute(CURSOR)).fetchone()
            return row[0] if row else None

    async def move_sweep_cursor(self, to: datetime) -> None:
        async with self._reading.connection() as connection:
            await connection.execute(MOVE_CURSOR, (to,))

    async def prune_answers(self, *, before: datetime) -> int:
        async with self._reading.connection() as connection:
            return (await connection.execute(PRUNE_ANSWERS, (before,))).rowcount

    async def _calls(
        self, statement: str, arguments: Mapping[str, Any], *, with_attempts: bool = True
    ) -> list[CallRecord]:
        async with self._reading.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            rows = await (await cursor.execute(statement, arguments)).fetchall()
            attempts: dict[UUID, list[Any]] = {}
            if rows and with_attempts:
                keys = {"users": [row["user_id"] for row in rows], "calls": [row["call_id"] for row in rows]}
                for row in await (await cursor.execute(ATTEMPTS_OF, keys)).fetchall():
                    attempts.setdefault(row["call_id"], []).append(attempt_from_row(row))
        return [call_from_row(row, tuple(attempts.get(row["call_id"], ()))) for row in rows]


def unknown_outcome_of(hold: ExpiredHold) -> CallRecord:
    """The record of a call of which only the hold is known."""
    return unknown_outcome(
        call_id=hold.call_id, user_id=hold.user_id, request_id=hold.request_id, scene=hold.scene,
        provider=hold.provider, model=hold.model, hold_micros=hold.held_micros,
        max_output_tokens=hold.max_output_tokens, opened_at=hold.opened_at, closed_at=hold.closed_at,
    )
