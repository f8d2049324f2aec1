"""The hot path: one transaction for a batch, two waits before the decision's writes, COPY for what is new."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout

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
ENTRIES_BY_EVENT = f"""
SELECT {', '.join('e.' + name for name in tables.ledger_entry.columns.keys())}
FROM unnest(%s::text[], %s::text[]) AS wanted (user_id, event_id) JOIN ledger_entry AS e USING (user_id, event_id)
"""
HOLDS_BY_ID = f"""
SELECT {', '.join('h.' + name for name in tables.hold.columns.keys())}
FROM unnest(%s::text[], %s::uuid[]) AS wanted (user_id, hold_id) JOIN hold AS h USING (user_id, hold_id)
"""
HOLDS_BY_REQUEST = f"""
SELECT {', '.join('h.' + name for name in tables.hold.columns.keys())}
FROM unnest(%s::text[], %s::text[]) AS wanted (user_id, request_id) JOIN hold AS h USING (user_id, request_id)
WHERE h.request_id <> '' AND h.state IN (1, 2)
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
COPY_ACCOUNTS = f"COPY account ({row_mapping.ACCOUNT_COLUMNS}) FROM STDIN (FORMAT BINARY)"
COPY_ENTRIES = f"COPY ledger_entry ({row_mapping.ENTRY_COLUMNS}) FROM STDIN (FORMAT BINARY)"
COPY_HOLDS = f"COPY hold ({row_mapping.HOLD_COLUMNS}) FROM STDIN (FORMAT BINARY)"
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
        await self._copy(COPY_ACCOUNTS, ACCOUNT_TYPES, [row_mapping.account_to_row(a) for a in book.new_accounts])
        await self._copy(COPY_ENTRIES, ENTRY_TYPES, [row_mapping.entry_to_row(entry) for entry in book.new_entries])
        await self._copy(COPY_HOLDS, HOLD_TYPES, [row_mapping.hold_to_row(hold) for hold in book.new_holds.values()])
        async with self._connection.pipeline():
            await self._update_holds(list(book.changed_holds.values()))
            await self._update_accounts(book.changed_accounts)
            if book.issues:
                await self._connection.execute(INSERT_ISSUES, _columns([
                    (issue.user_id, issue.event_id, issue.kind, issue.detail, self._encode_issue(issue))
                    for issue in book.issues
                ], 5))

    async def commit(self) -> None:
        await self._connection.execute("COMMIT")
        self._open = False

    async def roll_back_unless_committed(self) -> None:
        if self._open and not self._connection.broken:
            with contextlib.suppress(psycopg.OperationalError):
                await self._connection.execute("ROLLBACK")

    async def _copy(self, statement: str, types: list[str], rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
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


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as columns, for unnest."""
    return [[row[index] for row in rows] for index in range(width)]
