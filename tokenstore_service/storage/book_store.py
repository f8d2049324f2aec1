"""The hot path: one transaction for a batch, two round trips: lock and read; write and commit."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import orjson
import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout
from sqlalchemy import Table

from servicekit.core.offsets import OffsetMove
from servicekit.db.database import Connection, Database, is_transient
from servicekit.kafka.offsets import move_offsets
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, BookKeys
from tokenstore_service.domain.commands import ChargeIssue
from tokenstore_service.domain.hold import Hold
from tokenstore_service.storage import row_mapping, tables
from tokenstore_service.usecases.ports import BookUnit, Loaded, TransientFailure

log = EventLogger(__name__)

# One lock order for everybody, so that there are no deadlocks. NO KEY UPDATE does not block readers of keys.
LOCK_ACCOUNTS = f"""
SELECT {row_mapping.ACCOUNT_COLUMNS} FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id FOR NO KEY UPDATE
"""
# Exact, because every writer of an account's entries and holds has its lock; read after it, in a newer snapshot.
# LATERAL with OFFSET 0 looks each key up by its index, whatever the planner thinks of the tables' sizes.
ENTRIES_BY_EVENT = f"""
SELECT e.* FROM unnest(%s::text[], %s::text[]) AS wanted (user_id, event_id) CROSS JOIN LATERAL (
    SELECT {row_mapping.ENTRY_COLUMNS} FROM ledger_entry AS l
    WHERE l.user_id = wanted.user_id AND l.event_id = wanted.event_id OFFSET 0
) AS e
"""
HOLDS_BY_ID = f"""
SELECT h.* FROM unnest(%s::text[], %s::uuid[]) AS wanted (user_id, hold_id) CROSS JOIN LATERAL (
    SELECT {row_mapping.HOLD_COLUMNS} FROM hold AS l
    WHERE l.user_id = wanted.user_id AND l.hold_id = wanted.hold_id OFFSET 0
) AS h
"""
HOLDS_BY_REQUEST = f"""
SELECT h.* FROM unnest(%s::text[], %s::text[]) AS wanted (user_id, request_id) CROSS JOIN LATERAL (
    SELECT {row_mapping.HOLD_COLUMNS} FROM hold AS l
    WHERE l.user_id = wanted.user_id AND l.request_id = wanted.request_id AND l.request_id <> ''
        AND l.state IN (1, 2) OFFSET 0
) AS h
"""
UPDATE_ACCOUNTS = """
UPDATE account AS a SET
    balance_micros = n.balance_micros, held_micros = n.held_micros, total_recharged_micros = n.recharged,
    total_rewarded_micros = n.rewarded, total_consumed_micros = n.consumed, seq = n.seq, head_hash = n.head_hash,
    updated_at = %s
FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bytea[])
    AS n (user_id, balance_micros, held_micros, recharged, rewarded, consumed, seq, head_hash)
WHERE a.user_id = n.user_id
"""
UPDATE_HOLDS = """
UPDATE hold AS h SET state = n.state, expires_at = n.expires_at, closed_at = n.closed_at
FROM unnest(%s::text[], %s::uuid[], %s::smallint[], %s::timestamptz[], %s::timestamptz[])
    AS n (user_id, hold_id, state, expires_at, closed_at)
WHERE h.user_id = n.user_id AND h.hold_id = n.hold_id
"""
INSERT_ISSUES = """
INSERT INTO charge_issue (user_id, event_id, kind, detail, original, noticed_at)
SELECT i.*, now() FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::bytea[]) AS i
"""
INSERTS = {
    table.name: f"INSERT INTO {table.name} SELECT * FROM json_populate_recordset(NULL::{table.name}, %s::json)"
    for table in (tables.account, tables.ledger_entry, tables.hold)
}
MOST_ROWS_AS_JSON = 64
"""Up to here one parameter of JSON inside the pipeline is cheaper than the two round trips of a COPY."""
ACCOUNT_TYPES = row_mapping.copy_types(tables.account)
ENTRY_TYPES = row_mapping.copy_types(tables.ledger_entry)
HOLD_TYPES = row_mapping.copy_types(tables.hold)


class PostgresBookStore:
    """Units on PostgreSQL. `encode_issue` keeps the original of a charge that is not simply applied."""

    def __init__(self, database: Database, *, encode_issue: Callable[[ChargeIssue], bytes]) -> None:
        self._database = database
        self._encode_issue = encode_issue

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[BookUnit]:
        try:
            async with self._database.raw_connection() as connection:
                unit = _PostgresUnit(connection, self._encode_issue)
                try:
                    yield unit
                finally:
                    await unit.roll_back_unless_committed()
        except (psycopg.Error, PoolTimeout) as error:
            # A unique violation means that somebody else made the same account or entry first: look again.
            if is_transient(error) or isinstance(error, errors.UniqueViolation):
                log.warning("books_try_again", kind=type(error).__name__, sqlstate=getattr(error, "sqlstate", None))
                raise TransientFailure from error
            raise


class _PostgresUnit:
    def __init__(self, connection: Connection, encode_issue: Callable[[ChargeIssue], bytes]) -> None:
        self._connection = connection
        self._encode_issue = encode_issue
        self._open = False
        self._book: Book | None = None

    async def load(self, keys: BookKeys) -> Loaded:
        run = self._connection.execute
        events, holds, requests = sorted(keys.event_ids), list(keys.hold_ids), sorted(keys.request_ids)
        self._open = True
        async with self._connection.pipeline():
            await run("BEGIN")
            accounts = await run(LOCK_ACCOUNTS, (sorted(keys.user_ids),), binary=True)
            entries_found = await run(ENTRIES_BY_EVENT, _columns(events, 2), binary=True) if events else None
            holds_found = await run(HOLDS_BY_ID, _columns(holds, 2), binary=True) if holds else None
            requests_found = await run(HOLDS_BY_REQUEST, _columns(requests, 2), binary=True) if requests else None
        rows = {row[:2]: row for cursor in (holds_found, requests_found) if cursor for row in await cursor.fetchall()}
        entry_rows = await entries_found.fetchall() if entries_found else []
        return Loaded(
            accounts=[row_mapping.account_from_row(row) for row in await accounts.fetchall()],
            holds=[row_mapping.hold_from_row(row) for row in rows.values()],
            entries=[row_mapping.entry_from_row(row) for row in entry_rows],
        )

    async def save(self, book: Book, moves: Sequence[OffsetMove]) -> None:
        if moves:
            await move_offsets(self._connection, moves)
        self._book = book

    async def commit(self) -> None:
        """Everything that changed, and the COMMIT, in one round trip; large batches send what is new by COPY before."""
        book = self._book
        assert book is not None
        inserts = (
            (tables.account, ACCOUNT_TYPES, [row_mapping.account_to_row(each) for each in book.new_accounts]),
            (tables.ledger_entry, ENTRY_TYPES, [row_mapping.entry_to_row(each) for each in book.new_entries]),
            (tables.hold, HOLD_TYPES, [row_mapping.hold_to_row(each) for each in book.new_holds.values()]),
        )
        for table, types, rows in inserts:
            if len(rows) > MOST_ROWS_AS_JSON:
                await self._copy(table, types, rows)
        async with self._connection.pipeline():
            for table, _, rows in inserts:
                if 0 < len(rows) <= MOST_ROWS_AS_JSON:
                    await self._connection.execute(INSERTS[table.name], (_rows_as_json(table, rows),))
            await self._update_holds(list(book.changed_holds.values()))
            await self._update_accounts(book.changed_accounts)
            if book.issues:
                await self._connection.execute(INSERT_ISSUES, _columns([
                    (issue.user_id, issue.event_id, issue.kind, issue.detail, self._encode_issue(issue))
                    for issue in book.issues
                ], 5))
            await self._connection.execute("COMMIT")
        self._open = False

    async def roll_back_unless_committed(self) -> None:
        if self._open and not self._connection.broken:
            with contextlib.suppress(psycopg.OperationalError):
                await self._connection.execute("ROLLBACK")

    async def _copy(self, table: Table, types: list[str], rows: list[tuple[Any, ...]]) -> None:
        statement = f"COPY {table.name} ({', '.join(table.columns.keys())}) FROM STDIN (FORMAT BINARY)"
        async with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(types)
            for row in rows:
                await copy.write_row(row)

    async def _update_holds(self, holds: list[Hold]) -> None:
        if holds:
            rows = [(hold.user_id, hold.hold_id, int(hold.state), hold.expires_at, hold.closed_at) for hold in holds]
            await self._connection.execute(UPDATE_HOLDS, _columns(rows, 5))

    async def _update_accounts(self, accounts: list[Account]) -> None:
        if accounts:
            rows = [
                (
                    account.user_id, account.balance_micros, account.held_micros, account.total_recharged_micros,
                    account.total_rewarded_micros, account.total_consumed_micros, account.seq, account.head_hash,
                )
                for account in accounts
            ]
            await self._connection.execute(UPDATE_ACCOUNTS, [accounts[0].updated_at, *_columns(rows, 8)])


def _rows_as_json(table: Table, rows: Sequence[tuple[Any, ...]]) -> str:
    names = [f"{name}" for name in table.columns.keys()]  # plain strings: SQLAlchemy's own are a subclass
    return orjson.dumps([dict(zip(names, row, strict=True)) for row in rows], default=_bytea).decode()


def _bytea(value: Any) -> str:
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    raise TypeError(type(value).__name__)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as columns, for unnest."""
    return [[row[index] for row in rows] for index in range(width)]
