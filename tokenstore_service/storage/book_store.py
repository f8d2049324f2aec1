"""The hot path: one transaction for a batch, two round trips: lock and read; write and commit.

A batch whose accounts ask for lots or budgets takes a third one in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import psycopg
from psycopg import AsyncCopy, errors
from psycopg_pool import PoolTimeout
from sqlalchemy import Table

from servicekit.core.faults import FaultPoint, Faults, NoFaults
from servicekit.core.offsets import OffsetMove
from servicekit.db.database import Connection, Database, is_transient
from servicekit.kafka.offsets import move_offsets
from servicekit.outbox.message import lane_of
from servicekit.outbox.table import INSERT_COLUMNS
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, BookKeys, Loaded, Wanted
from tokenstore_service.domain.commands import ChargeIssue
from tokenstore_service.domain.hold import Hold
from tokenstore_service.storage import row_mapping, tables
from tokenstore_service.usecases.ports import Announcement, BookUnit, EncodedIssue, TransientFailure

log = EventLogger(__name__)

# One lock order for everybody, so that there are no deadlocks. NO KEY UPDATE does not block readers of keys.
LOCK_ACCOUNTS = f"""
SELECT {row_mapping.ACCOUNT_COLUMNS} FROM account WHERE user_id = ANY(%s::text[]) ORDER BY user_id FOR NO KEY UPDATE
"""


def _by_key(columns: str, table: str, wanted: str, condition: str) -> str:
    """Rows by keys given as arrays. Exact, because every writer of an account's rows has its lock; read after it, in a
    newer snapshot. LATERAL with OFFSET 0 looks each key up by its index, whatever the planner thinks of the sizes."""
    casts = ", ".join(f"%s::{part.split()[1]}[]" for part in wanted.split(", "))
    names = ", ".join(part.split()[0] for part in wanted.split(", "))
    return f"""
SELECT r.* FROM unnest({casts}) AS wanted ({names}) CROSS JOIN LATERAL (
    SELECT {columns} FROM {table} AS l WHERE l.user_id = wanted.user_id AND {condition} OFFSET 0
) AS r
"""


ENTRIES_BY_EVENT = _by_key(
    row_mapping.ENTRY_COLUMNS, "ledger_entry", "user_id text, event_id text", "l.event_id = wanted.event_id"
)
ENTRIES_BY_SEQ = _by_key(row_mapping.ENTRY_COLUMNS, "ledger_entry", "user_id text, seq bigint", "l.seq = wanted.seq")
REVERSALS = _by_key(
    row_mapping.ENTRY_COLUMNS, "ledger_entry", "user_id text, seq bigint",
    "l.reverses_seq = wanted.seq AND l.reverses_seq IS NOT NULL",
)
HOLDS_BY_ID = _by_key(row_mapping.HOLD_COLUMNS, "hold", "user_id text, hold_id uuid", "l.hold_id = wanted.hold_id")
HOLDS_BY_REQUEST = _by_key(
    row_mapping.HOLD_COLUMNS, "hold", "user_id text, request_id text",
    "l.request_id = wanted.request_id AND l.request_id <> '' AND l.state IN (1, 2)",
)
OPEN_HOLDS = f"SELECT {row_mapping.HOLD_COLUMNS} FROM hold WHERE user_id = ANY(%s::text[]) AND state = 1"
OPEN_LOTS = f"SELECT {row_mapping.LOT_COLUMNS} FROM lot WHERE user_id = ANY(%s::text[]) AND is_open"
# The head's row lags behind its account: see Account.head_lot.
LOTS_UP_TO = f"""
SELECT r.* FROM unnest(%s::text[], %s::bigint[]) AS wanted (user_id, needed)
JOIN account AS a ON a.user_id = wanted.user_id CROSS JOIN LATERAL (
    SELECT {row_mapping.LOT_COLUMNS} FROM (
        SELECT l.*, sum(CASE WHEN l.seq = a.head_lot THEN a.head_lot_micros ELSE l.remaining_micros END)
            OVER (ORDER BY l.priority, l.expires_at, l.seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
        FROM lot AS l WHERE l.user_id = wanted.user_id AND l.is_open
    ) AS ranked WHERE wanted.needed IS NULL OR coalesce(before, 0) <= wanted.needed OFFSET 0
) AS r
"""
LOTS_BY_SEQ = _by_key(row_mapping.LOT_COLUMNS, "lot", "user_id text, seq bigint", "l.seq = wanted.seq")
ORDERS_BY_ID = _by_key(
    row_mapping.ORDER_COLUMNS, "credit_order", "user_id text, order_id uuid", "l.order_id = wanted.order_id"
)
ORDERS_BY_KEY = _by_key(
    row_mapping.ORDER_COLUMNS, "credit_order", "user_id text, key text", "l.idempotency_key = wanted.key"
)
SLOTS = _by_key(
    row_mapping.SLOT_COLUMNS, "limit_slot", "user_id text, subject text, period_start timestamptz",
    "l.subject = wanted.subject AND l.period_start = wanted.period_start",
)
BUDGETS = f"SELECT {row_mapping.BUDGET_COLUMNS} FROM budget WHERE user_id = ANY(%s::text[])"

# What holds and charges change.
UPDATE_ACCOUNTS = """
UPDATE account AS a SET
    balance_micros = n.balance_micros, held_micros = n.held_micros, total_consumed_micros = n.consumed, seq = n.seq,
    head_hash = n.head_hash, updated_at = n.updated_at, version = n.version, head_lot_micros = n.head_lot_micros
FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bytea[], %s::timestamptz[],
    %s::bigint[], %s::bigint[])
    AS n (user_id, balance_micros, held_micros, consumed, seq, head_hash, updated_at, version, head_lot_micros)
WHERE a.user_id = n.user_id
"""
# What else can change, for the few accounts where it may have.
UPDATE_REST_OF_ACCOUNTS = """
UPDATE account AS a SET
    overdraft_limit_micros = n.overdraft, total_recharged_micros = n.recharged, total_rewarded_micros = n.rewarded,
    head_lot = n.head_lot, next_expiry_at = n.next_expiry_at, has_budgets = n.has_budgets, low_level = n.low_level
FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::timestamptz[], %s::boolean[],
    %s::integer[])
    AS n (user_id, overdraft, recharged, rewarded, head_lot, next_expiry_at, has_budgets, low_level)
WHERE a.user_id = n.user_id
"""
UPDATE_HOLDS = """
UPDATE hold AS h SET state = n.state, expires_at = n.expires_at, closed_at = n.closed_at, budget_ids = n.budget_ids
FROM unnest(%s::text[], %s::uuid[], %s::smallint[], %s::timestamptz[], %s::timestamptz[], %s::text[])
    AS n (user_id, hold_id, state, expires_at, closed_at, budget_ids)
WHERE h.user_id = n.user_id AND h.hold_id = n.hold_id
"""
ADD_CONSUMPTION = f"""
INSERT INTO consumption_hour AS c (user_id, hour, scene, model, {', '.join(tables.CONSUMPTION_COLUMNS)})
SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::text[], %s::text[]{', %s::bigint[]' * 6})
ON CONFLICT (user_id, hour, scene, model) DO UPDATE SET
    {', '.join(f'{name} = c.{name} + excluded.{name}' for name in tables.CONSUMPTION_COLUMNS)}
"""
INSERT_ISSUES = """
INSERT INTO charge_issue (user_id, event_id, kind, detail, original, noticed_at, seq, state, content_type, origin,
    fingerprint, resolved_by, note)
SELECT user_id, event_id, kind, detail, original, now(), seq, 1, content_type, '', md5(original), '', ''
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::bytea[], %s::bigint[], %s::text[])
    AS i (user_id, event_id, kind, detail, original, seq, content_type)
ON CONFLICT (user_id, event_id, kind, fingerprint) DO NOTHING
"""
INSERT_MESSAGES = f"""
INSERT INTO outbox_message ({INSERT_COLUMNS})
SELECT * FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::bytea[])
"""
FREE_SLOTS = """
DELETE FROM limit_slot AS s USING unnest(%s::text[], %s::text[]) AS freed (user_id, holder)
WHERE s.user_id = freed.user_id AND s.holder = freed.holder
"""
DELETE_BUDGETS = """
DELETE FROM budget AS b USING unnest(%s::text[], %s::text[]) AS gone (user_id, budget_id)
WHERE b.user_id = gone.user_id AND b.budget_id = gone.budget_id
"""


def _insert_statement(table: Table) -> str:
    return f"INSERT INTO {table.name} SELECT * FROM json_populate_recordset(NULL::{table.name}, %s::json)"


def _update_statement(table: Table) -> str:
    keys = [column.name for column in table.primary_key]
    sets = ", ".join(f"{name} = n.{name}" for name in table.columns.keys() if name not in keys)
    where = " AND ".join(f"t.{name} = n.{name}" for name in keys)
    return (
        f"UPDATE {table.name} AS t SET {sets} FROM json_populate_recordset(NULL::{table.name}, %s::json) AS n"
        f" WHERE {where}"
    )


MOST_ROWS_AS_JSON = 64
"""Up to here one parameter of JSON inside the pipeline is cheaper than the two round trips of a COPY."""
MOST_UNITS_ON_A_PLAN = 1024
MOST_CONNECTIONS = 1000
COPY_TYPES = {
    table.name: row_mapping.copy_types(table)
    for table in (
        tables.account, tables.ledger_entry, tables.hold, tables.lot, tables.credit_order, tables.order_step,
        tables.limit_slot, tables.budget,
    )
}


class PostgresBookStore:
    """Units on PostgreSQL. `encode_issue` keeps the original of a charge that is not simply applied, `announce` makes
    the message that tells of a changed balance."""

    def __init__(
        self, database: Database, *, encode_issue: Callable[[ChargeIssue], EncodedIssue],
        announce: Callable[[Account, int | None], Announcement], faults: Faults | None = None,
    ) -> None:
        self._database = database
        self._encode_issue = encode_issue
        self._announce = announce
        self._faults = faults or NoFaults()
        self._units_of: dict[int, int] = {}

    def _is_time_to_plan_again(self, connection: Connection) -> bool:
        """After 1, 2, 4, ... 1024 units of a connection, then every 1024. A plan that was made while a table was small
        may look up a key by another index, and would do so until the table is analysed."""
        pid = connection.info.backend_pid
        count = self._units_of[pid] = self._units_of.get(pid, 0) + 1
        if len(self._units_of) > MOST_CONNECTIONS:
            self._units_of.clear()
        return count % MOST_UNITS_ON_A_PLAN == 0 or (count < MOST_UNITS_ON_A_PLAN and count & (count - 1) == 0)

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[BookUnit]:
        try:
            async with self._database.raw_connection() as connection:
                unit = _PostgresUnit(
                    connection, self._encode_issue, self._announce, self._faults,
                    plan_again=self._is_time_to_plan_again(connection),
                )
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
    def __init__(
        self, connection: Connection, encode_issue: Callable[[ChargeIssue], EncodedIssue],
        announce: Callable[[Account, int | None], Announcement], faults: Faults, *, plan_again: bool,
    ) -> None:
        self._plan_again = plan_again
        self._connection = connection
        self._encode_issue = encode_issue
        self._announce = announce
        self._faults = faults
        self._book: Book | None = None
        self._open = False
        self._stack = contextlib.AsyncExitStack()
        self._copying: AsyncCopy | None = None
        self._sent = 0

    async def load(self, keys: BookKeys) -> Loaded:
        self._open = True
        accounts, entries, holds, lots, orders, slots, budgets = await self._read(
            (_wanted(LOCK_ACCOUNTS, sorted(keys.user_ids)),),
            (
                _wanted(ENTRIES_BY_EVENT, keys.event_ids), _wanted(ENTRIES_BY_SEQ, keys.reversed_seqs),
                _wanted(REVERSALS, keys.reversed_seqs),
            ),
            (
                _wanted(HOLDS_BY_ID, keys.hold_ids), _wanted(HOLDS_BY_REQUEST, keys.request_ids),
                _wanted(OPEN_HOLDS, keys.open_hold_users),
            ),
            (_wanted(OPEN_LOTS, keys.lot_users),),
            (_wanted(ORDERS_BY_ID, keys.order_ids), _wanted(ORDERS_BY_KEY, keys.order_keys)),
            (_wanted(SLOTS, keys.slots),),
            (_wanted(BUDGETS, keys.budget_users),),
            begin=True,
        )
        return Loaded(
            accounts=[row_mapping.account_from_row(row) for row in accounts],
            holds=[row_mapping.hold_from_row(row) for row in holds],
            entries=[row_mapping.entry_from_row(row) for row in entries],
            lots=[row_mapping.lot_from_row(row) for row in lots], whole_lot_users=frozenset(keys.lot_users),
            orders=[row_mapping.order_from_row(row) for row in orders],
            slots=[row_mapping.slot_from_row(row) for row in slots],
            budgets=[row_mapping.budget_from_row(row) for row in budgets],
        )

    async def load_more(self, loaded: Loaded, wanted: Wanted) -> Loaded:
        up_to = list(wanted.lots_up_to.items())
        lots, budgets = await self._read(
            (_wanted(LOTS_UP_TO, up_to), _wanted(LOTS_BY_SEQ, wanted.lot_seqs)),
            (_wanted(BUDGETS, wanted.budget_users),),
        )
        known = {(lot.user_id, lot.seq) for lot in loaded.lots}
        loaded.lots = [*loaded.lots, *(row_mapping.lot_from_row(row) for row in lots if row[:2] not in known)]
        loaded.whole_lot_users |= {user for user, needed in up_to if needed is None}
        loaded.budgets = [*loaded.budgets, *(row_mapping.budget_from_row(row) for row in budgets)]
        return loaded

    async def _read(
        self, *groups: Sequence[tuple[str, Sequence[Any]] | None], begin: bool = False
    ) -> list[list[tuple[Any, ...]]]:
        """The rows of each group's statements, in one round trip; None is left out, a row that two find counts once."""
        run = self._connection.execute
        cursors: list[list[Any]] = []
        async with self._connection.pipeline():
            if begin and self._plan_again:
                await run("DISCARD PLANS")
            if begin:
                await run("BEGIN")
            for group in groups:
                found = [await run(statement, arguments, binary=True) for statement, arguments in filter(None, group)]
                cursors.append(found)
        answers = []
        for found in cursors:
            if len(found) == 1:
                answers.append(await found[0].fetchall())
            else:
                rows = {row[:2]: row for cursor in found for row in await cursor.fetchall()}
                answers.append(list(rows.values()))
        return answers

    async def send(self, book: Book) -> None:
        """By COPY, once there are enough entries that it pays; it stays open until save."""
        if self._copying is None:
            if len(book.new_entries) <= MOST_ROWS_AS_JSON:
                return
            table = tables.ledger_entry
            self._copying = await self._stack.enter_async_context(self._open_copy(table))
        while self._sent < len(book.new_entries):
            await self._copying.write_row(row_mapping.entry_to_row(book.new_entries[self._sent]))
            self._sent += 1

    async def save(self, book: Book, moves: Sequence[OffsetMove]) -> None:
        await self.send(book)
        await self._stack.aclose()
        if moves:
            await move_offsets(self._connection, moves)
        self._book = book

    async def commit(self) -> None:
        """Everything that changed, and the COMMIT, in one round trip; large batches send what is new by COPY before."""
        book = self._book
        assert book is not None
        inserts: list[tuple[Table, list[tuple[Any, ...]]]] = [
            (tables.account, [row_mapping.account_to_row(each) for each in book.new_accounts]),
            (tables.ledger_entry, [row_mapping.entry_to_row(each) for each in book.new_entries[self._sent:]]),
            (tables.hold, [row_mapping.hold_to_row(each) for each in book.new_holds.values()]),
            (tables.lot, [row_mapping.lot_to_row(each) for each in book.new_lots]),
            (tables.credit_order, [row_mapping.order_to_row(each) for each in book.new_orders.values()]),
            (tables.order_step, [row_mapping.order_step_to_row(each) for each in book.new_steps]),
            (tables.limit_slot, [row_mapping.slot_to_row(each) for each in book.new_slots]),
            (tables.budget, [row_mapping.budget_to_row(each) for each in book.new_budgets.values()]),
        ]
        updates: list[tuple[Table, list[tuple[Any, ...]]]] = [
            (tables.lot, [row_mapping.lot_to_row(each) for each in book.changed_lots]),
            (tables.credit_order, [row_mapping.order_to_row(each) for each in book.changed_orders.values()]),
            (tables.budget, [row_mapping.budget_to_row(each) for each in book.changed_budgets.values()]),
        ]
        for table, rows in inserts:
            if len(rows) > MOST_ROWS_AS_JSON:
                await self._copy(table, rows)
        run = self._connection.execute
        async with self._connection.pipeline() as pipeline:
            if book.freed_holders:
                await run(FREE_SLOTS, _columns(book.freed_holders))
            for table, rows in inserts:
                if 0 < len(rows) <= MOST_ROWS_AS_JSON:
                    await run(_insert_statement(table), (_rows_as_json(table, rows),))
            for table, rows in updates:
                if rows:
                    await run(_update_statement(table), (_rows_as_json(table, rows),))
            await self._update_holds(list(book.changed_holds.values()))
            await self._update_accounts(book.changed_accounts, book.widely_changed)
            if book.consumption:
                await run(ADD_CONSUMPTION, _columns([(*key, *sums) for key, sums in book.consumption.items()]))
            if book.deleted_budgets:
                gone = [(budget.user_id, budget.budget_id) for budget in book.deleted_budgets]
                await run(DELETE_BUDGETS, _columns(gone))
            await self._add_issues(book.issues)
            await self._add_messages(book)
            if not isinstance(self._faults, NoFaults):
                await pipeline.sync()
                self._faults.reach(FaultPoint.APPLY_WRITTEN)
            await run("COMMIT")
        self._open = False

    async def roll_back_unless_committed(self) -> None:
        if self._copying is not None:  # only when save was not reached: end the COPY, so that a ROLLBACK can follow
            with contextlib.suppress(psycopg.Error):
                await self._stack.aclose()
        if self._open and not self._connection.broken:
            with contextlib.suppress(psycopg.OperationalError):
                await self._connection.execute("ROLLBACK")

    @contextlib.asynccontextmanager
    async def _open_copy(self, table: Table) -> AsyncIterator[AsyncCopy]:
        statement = f"COPY {table.name} ({', '.join(table.columns.keys())}) FROM STDIN (FORMAT BINARY)"
        async with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types(COPY_TYPES[table.name])
            yield copy

    async def _copy(self, table: Table, rows: list[tuple[Any, ...]]) -> None:
        async with self._open_copy(table) as copy:
            for row in rows:
                await copy.write_row(row)

    async def _update_holds(self, holds: list[Hold]) -> None:
        if holds:
            rows = [
                (
                    hold.user_id, hold.hold_id, int(hold.state), hold.expires_at, hold.closed_at,
                    row_mapping.budget_ids_to_text(hold.budget_ids),
                )
                for hold in holds
            ]
            await self._connection.execute(UPDATE_HOLDS, _columns(rows))

    async def _update_accounts(self, accounts: list[Account], widely_changed: set[str]) -> None:
        if accounts:
            await self._connection.execute(UPDATE_ACCOUNTS, _columns([
                (
                    each.user_id, each.balance_micros, each.held_micros, each.total_consumed_micros, each.seq,
                    each.head_hash, each.updated_at, each.version, each.head_lot_micros,
                )
                for each in accounts
            ]))
        widely = [account for account in accounts if account.user_id in widely_changed]
        if widely:
            await self._connection.execute(UPDATE_REST_OF_ACCOUNTS, _columns([
                (
                    each.user_id, each.overdraft_limit_micros, each.total_recharged_micros, each.total_rewarded_micros,
                    each.head_lot, each.next_expiry_at, each.has_budgets, each.low_level,
                )
                for each in widely
            ]))

    async def _add_issues(self, issues: Sequence[ChargeIssue]) -> None:
        if issues:
            rows = []
            for issue in issues:
                encoded = self._encode_issue(issue)
                rows.append((
                    issue.user_id, issue.event_id, issue.kind.name, issue.detail, encoded.original, issue.seq,
                    encoded.content_type,
                ))
            await self._connection.execute(INSERT_ISSUES, _columns(rows))

    async def _add_messages(self, book: Book) -> None:
        if book.announced:
            rows = []
            for account in book.announced:
                made = self._announce(account, book.low_accounts.get(account.user_id))
                rows.append((
                    lane_of(account.user_id), account.user_id, made.event_id, made.event_type, made.topic, made.payload
                ))
            await self._connection.execute(INSERT_MESSAGES, _columns(rows))


def _wanted(statement: str, keys: Collection[Any]) -> tuple[str, Sequence[Any]] | None:
    """The statement with its keys as arrays, one for each column; None when there are no keys."""
    if not keys:
        return None
    rows = [key if isinstance(key, tuple) else (key,) for key in keys]
    return statement, _columns(rows)


def _rows_as_json(table: Table, rows: Sequence[tuple[Any, ...]]) -> str:
    names = [f"{name}" for name in table.columns.keys()]  # plain strings: SQLAlchemy's own are a subclass
    return orjson.dumps([dict(zip(names, row, strict=True)) for row in rows], default=_bytea).decode()


def _bytea(value: Any) -> str:
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    raise TypeError(type(value).__name__)


def array_text(values: Iterable[Any]) -> str:
    """An array as PostgreSQL reads it, in a fifth of the driver's own time. Elements are of the kinds below."""
    return "{" + ",".join([_ELEMENT[type(value)](value) for value in values]) + "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_ELEMENT: dict[type, Callable[[Any], str]] = {
    int: str, str: _quoted, bytes: lambda value: f'"\\\\x{value.hex()}"', bool: lambda value: "t" if value else "f",
    datetime: lambda value: f'"{value.isoformat()}"', UUID: str, type(None): lambda _value: "NULL",
}


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Rows as arrays, one for each column, for unnest."""
    return [array_text(column) for column in zip(*rows, strict=True)]
