"""Reads of the books. Every statement about an account carries its user_id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from servicekit.batching import MicroBatcher
from servicekit.db.database import Connection, Database
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.storage import row_mapping
from tokenstore_service.storage.row_mapping import ACCOUNT_COLUMNS, ENTRY_COLUMNS, HOLD_COLUMNS
from tokenstore_service.usecases.ports import AccountPart, AuditPart, EntryFilter

ACCOUNTS = f"SELECT {ACCOUNT_COLUMNS} FROM account WHERE user_id = ANY(%s)"
ENTRIES = f"""
SELECT {ENTRY_COLUMNS} FROM ledger_entry
WHERE user_id = %(user_id)s AND seq < %(before_seq)s
    AND (%(source)s::smallint IS NULL OR source = %(source)s)
    AND (%(is_expense)s::boolean IS NULL
        OR %(is_expense)s = (amount_micros < 0 OR (amount_micros = 0 AND source = 2)))
    AND (%(since)s::timestamptz IS NULL OR occurred_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR occurred_at < %(until)s)
ORDER BY seq DESC LIMIT %(limit)s
"""
ENTRY_BY_SEQ = f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND seq = %s"
ENTRY_BY_EVENT = f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND event_id = %s"
HOLD = f"SELECT {HOLD_COLUMNS} FROM hold WHERE user_id = %s AND hold_id = %s"
HOLDS_OF_USER = f"""
SELECT {HOLD_COLUMNS} FROM hold
WHERE user_id = %(user_id)s AND state = %(state)s
    AND (%(before_at)s::timestamptz IS NULL OR (opened_at, hold_id) < (%(before_at)s, %(before_id)s))
ORDER BY opened_at DESC, hold_id DESC LIMIT %(limit)s
"""
EXPIRED_HOLDS = f"""
SELECT {HOLD_COLUMNS} FROM hold
WHERE state = 4 AND closed_at >= %(since)s AND (%(origin)s = '' OR origin = %(origin)s)
    AND (%(after_at)s::timestamptz IS NULL OR (closed_at, hold_id) > (%(after_at)s, %(after_id)s))
ORDER BY closed_at, hold_id LIMIT %(limit)s
"""
HOLDS_TO_EXPIRE = "SELECT user_id, hold_id FROM hold WHERE state = 1 AND expires_at <= %s ORDER BY expires_at LIMIT %s"

LINGER_SECONDS = 0.001
AUDIT_ACCOUNTS = 200
AUDIT_ENTRIES = 2000
# The next users to audit: those with an account, and those that only have entries.
NEXT_USERS = """
SELECT user_id FROM (
    (SELECT user_id FROM account WHERE user_id > %(after)s ORDER BY user_id LIMIT %(limit)s)
    UNION
    (SELECT DISTINCT user_id FROM ledger_entry WHERE user_id > %(after)s ORDER BY user_id LIMIT %(limit)s)
) AS users ORDER BY user_id LIMIT %(limit)s
"""
HELD = "SELECT user_id, sum(held_micros)::bigint FROM hold WHERE user_id = ANY(%s) AND state = 1 GROUP BY user_id"
AUDITED_ENTRIES = f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND seq > %s ORDER BY seq LIMIT %s"

NO_SEQ = 2**63 - 1


class PostgresLedgerReader:
    """Reads on PostgreSQL. Balances that are asked for at the same time are read together."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asked_accounts: MicroBatcher[str, Account | None] = MicroBatcher(
            self._read_accounts, name="balances", linger_seconds=LINGER_SECONDS
        )

    async def accounts(self, user_ids: Sequence[str]) -> dict[str, Account]:
        found = await asyncio.gather(*[self._asked_accounts.enqueue(user_id) for user_id in user_ids])
        return {account.user_id: account for account in found if account is not None}

    async def _read_accounts(self, user_ids: Sequence[str]) -> Sequence[Account | None]:
        rows = {row[0]: row for row in await self._rows(ACCOUNTS, (list(set(user_ids)),))}
        return [
            row_mapping.account_from_row(rows[user_id]) if user_id in rows else None for user_id in user_ids
        ]

    async def entries(self, wanted: EntryFilter, *, before_seq: int | None, limit: int) -> list[Entry]:
        rows = await self._rows(ENTRIES, {
            "user_id": wanted.user_id, "before_seq": NO_SEQ if before_seq is None else before_seq,
            "source": wanted.source, "is_expense": wanted.is_expense, "since": wanted.since, "until": wanted.until,
            "limit": limit,
        })
        return [row_mapping.entry_from_row(row) for row in rows]

    async def entry_by_seq(self, user_id: str, seq: int) -> Entry | None:
        rows = await self._rows(ENTRY_BY_SEQ, (user_id, seq))
        return row_mapping.entry_from_row(rows[0]) if rows else None

    async def entry_by_event(self, user_id: str, event_id: str) -> Entry | None:
        rows = await self._rows(ENTRY_BY_EVENT, (user_id, event_id))
        return row_mapping.entry_from_row(rows[0]) if rows else None

    async def hold(self, user_id: str, hold_id: UUID) -> Hold | None:
        rows = await self._rows(HOLD, (user_id, hold_id))
        return row_mapping.hold_from_row(rows[0]) if rows else None

    async def holds_of_user(
        self, user_id: str, *, state: HoldState, before: tuple[datetime, UUID] | None, limit: int
    ) -> list[Hold]:
        before_at, before_id = before or (None, None)
        rows = await self._rows(HOLDS_OF_USER, {
            "user_id": user_id, "state": int(state), "before_at": before_at, "before_id": before_id, "limit": limit,
        })
        return [row_mapping.hold_from_row(row) for row in rows]

    async def expired_holds(
        self, *, origin: str, since: datetime, after: tuple[datetime, UUID] | None, limit: int
    ) -> list[Hold]:
        after_at, after_id = after or (None, None)
        rows = await self._rows(
            EXPIRED_HOLDS,
            {"origin": origin, "since": since, "after_at": after_at, "after_id": after_id, "limit": limit},
        )
        return [row_mapping.hold_from_row(row) for row in rows]

    async def holds_to_expire(self, *, now: datetime, limit: int) -> list[tuple[str, UUID]]:
        return [(row[0], row[1]) for row in await self._rows(HOLDS_TO_EXPIRE, (now, limit))]

    async def audit(self, user_ids: Sequence[str] | None) -> AsyncIterator[AuditPart]:
        after = ""
        while True:
            users = list(user_ids) if user_ids is not None else await self._next_users(after)
            for user_id in users:
                async for part in self._audit_user(user_id):
                    yield part
            if user_ids is not None or len(users) < AUDIT_ACCOUNTS:
                return
            after = users[-1]

    async def _next_users(self, after: str) -> list[str]:
        return [row[0] for row in await self._rows(NEXT_USERS, {"after": after, "limit": AUDIT_ACCOUNTS})]

    async def _audit_user(self, user_id: str) -> AsyncIterator[AuditPart]:
        async with self._database.transaction(read_only_snapshot=True) as connection:
            accounts = await self._fetch(connection, ACCOUNTS, ([user_id],))
            held = await self._fetch(connection, HELD, ([user_id],))
            entries = await self._fetch(connection, AUDITED_ENTRIES, (user_id, -NO_SEQ, AUDIT_ENTRIES))
            if not accounts and not entries:
                return
            account = row_mapping.account_from_row(accounts[0]) if accounts else None
            yield AccountPart(user_id, account, held[0][1] if held else 0)
            while entries:
                for row in entries:
                    yield row_mapping.entry_from_row(row)
                if len(entries) < AUDIT_ENTRIES:
                    return
                entries = await self._fetch(connection, AUDITED_ENTRIES, (user_id, entries[-1][1], AUDIT_ENTRIES))

    async def _rows(self, statement: str, arguments: Any) -> list[Any]:
        async with self._database.connection() as connection:
            return await self._fetch(connection, statement, arguments)

    @staticmethod
    async def _fetch(connection: Connection, statement: str, arguments: Any) -> list[Any]:
        cursor = await connection.execute(statement, arguments, binary=True)
        return await cursor.fetchall()
