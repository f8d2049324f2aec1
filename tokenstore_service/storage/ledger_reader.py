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
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.consumption import Consumption, ConsumptionKey
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.lot import FOR_EVER, Lot
from tokenstore_service.storage import row_mapping, tables
from tokenstore_service.storage.row_mapping import (
    ACCOUNT_COLUMNS,
    BUDGET_COLUMNS,
    ENTRY_COLUMNS,
    HOLD_COLUMNS,
    LOT_COLUMNS,
)
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
    AND (%(scene)s = '' OR scene = %(scene)s) AND (%(model)s = '' OR model = %(model)s)
    AND (%(conversation_id)s = '' OR conversation_id = %(conversation_id)s)
ORDER BY seq DESC LIMIT %(limit)s
"""
# An order has few entries: its own index finds them.
ENTRIES_OF_ORDER = ENTRIES.replace("WHERE", "WHERE order_id = %(order_id)s AND order_id <> '' AND", 1)
REVERSALS = """
SELECT reverses_seq, seq FROM ledger_entry
WHERE user_id = %s AND reverses_seq = ANY(%s::bigint[]) AND reverses_seq IS NOT NULL
"""
LAST_SEQ = "SELECT seq FROM ledger_entry WHERE user_id = %s ORDER BY seq DESC LIMIT 1"
BOOKED_AT = "SELECT booked_at FROM ledger_entry WHERE user_id = %s AND seq = %s"
CONSUMPTION_GROUPS = {
    "none": "''", "model": "model", "scene": "scene", "hour": "to_char(hour, 'YYYY-MM-DD\"T\"HH24:00:00\"Z\"')",
    "day": "to_char(hour, 'YYYY-MM-DD\"T\"00:00:00\"Z\"')",
}
CONSUMPTION_ORDER = {"none": "1", "model": "7 DESC, 1", "scene": "7 DESC, 1", "hour": "1", "day": "1"}
SUMS = ", ".join(f"sum({name})::bigint" for name in tables.CONSUMPTION_COLUMNS)
CONSUMPTION = {
    group: f"""
SELECT {key}, {SUMS} FROM consumption_hour
WHERE user_id = %(user_id)s AND (%(since)s::timestamptz IS NULL OR hour >= %(since)s)
GROUP BY 1 ORDER BY {CONSUMPTION_ORDER[group]}
"""
    for group, key in CONSUMPTION_GROUPS.items()
}
# What really remains of the head of an account is in the account: see Account.head_lot.
TRUE_LOTS = f"""
SELECT {LOT_COLUMNS} FROM (
    SELECT l.user_id, l.seq, l.source, l.priority, l.granted_micros,
        CASE WHEN l.seq = a.head_lot THEN a.head_lot_micros ELSE l.remaining_micros END AS remaining_micros,
        l.expires_at, l.order_id, l.granted_at, l.is_open
    FROM lot AS l LEFT JOIN account AS a ON a.user_id = l.user_id WHERE l.user_id = %(user_id)s
) AS lots
"""
LOTS = f"""
{TRUE_LOTS} WHERE (%(with_closed)s OR remaining_micros > 0) AND (
    %(priority)s::int IS NULL
    OR (priority, coalesce(expires_at, 'infinity'), seq) > (%(priority)s::int, %(expires_at)s::timestamptz, %(seq)s)
) ORDER BY priority, coalesce(expires_at, 'infinity'), seq LIMIT %(limit)s
"""
AUDITED_LOTS = f"{TRUE_LOTS} WHERE remaining_micros > 0"
AUDITED_CONSUMPTION = f"""
SELECT user_id, hour, scene, model, {', '.join(tables.CONSUMPTION_COLUMNS)} FROM consumption_hour WHERE user_id = %s
"""
BUDGETS = f"""
SELECT {BUDGET_COLUMNS} FROM budget
WHERE user_id = %(user_id)s
    AND (%(after_at)s::timestamptz IS NULL OR (created_at, budget_id) > (%(after_at)s, %(after_id)s))
ORDER BY created_at, budget_id LIMIT %(limit)s
"""
ACCOUNTS_TO_EXPIRE = """
SELECT next_expiry_at, user_id FROM account
WHERE next_expiry_at <= %(now)s
    AND (%(after_at)s::timestamptz IS NULL OR (next_expiry_at, user_id) > (%(after_at)s, %(after_id)s))
ORDER BY next_expiry_at, user_id LIMIT %(limit)s
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
AUDITED_ENTRIES = f"""
SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE user_id = %s AND seq > %s AND seq <= %s ORDER BY seq LIMIT %s
"""

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
        rows = await self._rows(ENTRIES_OF_ORDER if wanted.order_id else ENTRIES, {
            "user_id": wanted.user_id, "before_seq": NO_SEQ if before_seq is None else before_seq,
            "source": wanted.source, "is_expense": wanted.is_expense, "since": wanted.since, "until": wanted.until,
            "scene": wanted.scene, "model": wanted.model, "conversation_id": wanted.conversation_id,
            "order_id": wanted.order_id, "limit": limit,
        })
        return [row_mapping.entry_from_row(row) for row in rows]

    async def entry_by_seq(self, user_id: str, seq: int) -> Entry | None:
        rows = await self._rows(ENTRY_BY_SEQ, (user_id, seq))
        return row_mapping.entry_from_row(rows[0]) if rows else None

    async def entry_by_event(self, user_id: str, event_id: str) -> Entry | None:
        rows = await self._rows(ENTRY_BY_EVENT, (user_id, event_id))
        return row_mapping.entry_from_row(rows[0]) if rows else None

    async def entry_at(self, user_id: str, at: datetime) -> Entry | None:
        """By halves: booked times never go back within an account, and (user_id, seq) is the key."""
        async with self._database.connection() as connection:
            last = await self._fetch(connection, LAST_SEQ, (user_id,))
            low, high = 0, last[0][0] if last else 0
            while low < high:
                middle = (low + high + 1) // 2
                row = await self._fetch(connection, BOOKED_AT, (user_id, middle))
                low, high = (middle, high) if row and row[0][0] <= at else (low, middle - 1)
        return await self.entry_by_seq(user_id, low) if low else None

    async def reversals(self, user_id: str, seqs: Sequence[int]) -> dict[int, int]:
        return dict(await self._rows(REVERSALS, (user_id, list(seqs))))

    async def consumption(
        self, user_id: str, *, since: datetime | None, group: str
    ) -> list[tuple[str, Consumption]]:
        rows = await self._rows(CONSUMPTION[group], {"user_id": user_id, "since": since})
        return [(row[0], Consumption(*row[1:])) for row in rows]

    async def lots(
        self, user_id: str, *, with_closed: bool, after: tuple[int, datetime, int] | None, limit: int
    ) -> list[Lot]:
        priority, expires_at, seq = after or (None, None, None)
        rows = await self._rows(LOTS, {
            "user_id": user_id, "with_closed": with_closed, "priority": priority, "seq": seq, "limit": limit,
            "expires_at": None if expires_at is None else "infinity" if expires_at == FOR_EVER else expires_at,
        })
        return [row_mapping.lot_from_row(row) for row in rows]

    async def budgets(self, user_id: str, *, after: tuple[datetime, str] | None, limit: int) -> list[Budget]:
        after_at, after_id = after or (None, None)
        rows = await self._rows(
            BUDGETS, {"user_id": user_id, "after_at": after_at, "after_id": after_id, "limit": limit}
        )
        return [row_mapping.budget_from_row(row) for row in rows]

    async def accounts_to_expire(
        self, *, now: datetime, after: tuple[datetime, str] | None, limit: int
    ) -> list[tuple[datetime, str]]:
        after_at, after_id = after or (None, None)
        rows = await self._rows(
            ACCOUNTS_TO_EXPIRE, {"now": now, "after_at": after_at, "after_id": after_id, "limit": limit}
        )
        return [(row[0], row[1]) for row in rows]

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

    async def audit(
        self, user_ids: Sequence[str] | None, *, after_user_id: str = "", after_seq: int = 0
    ) -> AsyncIterator[AuditPart]:
        after = after_user_id
        while True:
            users = list(user_ids) if user_ids is not None else await self._next_users(after)
            for user_id in users:
                async for part in self._audit_user(user_id, max(after_seq, 1)):
                    yield part
            if user_ids is not None or len(users) < AUDIT_ACCOUNTS:
                return
            after = users[-1]

    async def _next_users(self, after: str) -> list[str]:
        return [row[0] for row in await self._rows(NEXT_USERS, {"after": after, "limit": AUDIT_ACCOUNTS})]

    async def _audit_user(self, user_id: str, from_seq: int) -> AsyncIterator[AuditPart]:
        """Pages of their own, bounded by the account as it was at first, so that no snapshot is held for long: entries
        never change, and the account is read together with what hangs on it."""
        async with self._database.transaction(read_only_snapshot=True) as connection:
            accounts = await self._fetch(connection, ACCOUNTS, ([user_id],))
            held = await self._fetch(connection, HELD, ([user_id],))
            lots = await self._fetch(connection, AUDITED_LOTS, {"user_id": user_id})
            sums = await self._fetch(connection, AUDITED_CONSUMPTION, (user_id,))
            last = await self._fetch(connection, LAST_SEQ, (user_id,))
        if not accounts and not last:
            return
        consumption: dict[ConsumptionKey, Consumption] = {
            (row[0], row[1], row[2], row[3]): Consumption(*row[4:]) for row in sums
        }
        yield AccountPart(
            user_id, row_mapping.account_from_row(accounts[0]) if accounts else None, held[0][1] if held else 0,
            [row_mapping.lot_from_row(row) for row in lots], consumption,
        )
        after, until = from_seq - 1 if from_seq > 1 else -NO_SEQ, last[0][0] if last else 0
        while after < until:
            entries = await self._rows(AUDITED_ENTRIES, (user_id, after, until, AUDIT_ENTRIES))
            for row in entries:
                yield row_mapping.entry_from_row(row)
            if len(entries) < AUDIT_ENTRIES:
                return
            after = entries[-1][1]

    async def _rows(self, statement: str, arguments: Any) -> list[Any]:
        async with self._database.connection() as connection:
            return await self._fetch(connection, statement, arguments)

    @staticmethod
    async def _fetch(connection: Connection, statement: str, arguments: Any) -> list[Any]:
        cursor = await connection.execute(statement, arguments, binary=True)
        return await cursor.fetchall()
