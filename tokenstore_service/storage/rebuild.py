"""Everything that is derived from the entries, made again from them: into a shadow, compared, and put in place.

Account, lot and consumption rows are projections of the ledger (and of the open holds); should one be lost or wrong,
the entries can make it again. What no entry says stays as it is: overdraft limits, budgets, versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from tokenstore_service.domain.account import Account
from tokenstore_service.domain.replay import Replay
from tokenstore_service.storage import row_mapping, tables
from tokenstore_service.storage.tables import SCHEMA

PROJECTIONS = (tables.account, tables.lot, tables.consumption_hour)
ENTRIES = f"SELECT {row_mapping.ENTRY_COLUMNS} FROM ledger_entry ORDER BY user_id, seq"
HELD = "SELECT user_id, sum(held_micros)::bigint FROM hold WHERE state = 1 GROUP BY user_id"
KEPT = f"SELECT {row_mapping.ACCOUNT_COLUMNS} FROM account"
MOST_SHOWN = 20
# Compared by what the entries say: a head's row in `lot` lags behind on purpose, and empty lots carry nothing.
COMPARED = {
    "account": """
SELECT user_id, balance_micros, held_micros, seq, total_recharged_micros, total_rewarded_micros, total_consumed_micros,
    head_hash, head_lot_micros
FROM account{0}""",
    "lot": """
SELECT * FROM (
    SELECT l.user_id, l.seq,
        CASE WHEN l.seq = a.head_lot THEN a.head_lot_micros ELSE l.remaining_micros END AS left_over,
        l.expires_at, l.source, l.priority, l.order_id
    FROM lot{0} AS l LEFT JOIN account{0} AS a ON a.user_id = l.user_id
) AS lots WHERE left_over > 0""",
    "consumption_hour": "SELECT * FROM consumption_hour{0}",
}


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was made, and how it differs from what was there: lines for people, at most 20 a table."""

    accounts: int
    entries: int
    differences: list[str]
    is_swapped: bool


def rebuild(url: str, *, swap: bool) -> Rebuilt:
    """Reads go on while it runs; with `swap` writers wait (stop the servers of a large ledger meanwhile)."""
    options = f"-c search_path={SCHEMA} -c timezone=UTC"
    with psycopg.connect(url, options=options) as connection, connection.transaction():
        if swap:
            connection.execute("LOCK TABLE account, lot, consumption_hour IN EXCLUSIVE MODE")
        else:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for table in PROJECTIONS:
            connection.execute(
                f"CREATE TEMP TABLE {table.name}_shadow (LIKE {table.name} INCLUDING DEFAULTS) ON COMMIT DROP".encode()
            )
        accounts, entries = _fill(connection)
        differences = [line for table in PROJECTIONS for line in _compare(connection, table.name)]
        if swap:
            for table in PROJECTIONS:
                columns = ", ".join(table.columns.keys())
                connection.execute(f"DELETE FROM {table.name}".encode())
                connection.execute(
                    f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {table.name}_shadow".encode()
                )
        return Rebuilt(accounts, entries, differences, swap)


def _fill(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    held = dict(connection.execute(HELD).fetchall())
    kept = {row[0]: row_mapping.account_from_row(row) for row in connection.execute(KEPT, binary=True)}
    accounts = entries = 0
    replays: Iterator[tuple[Replay, int]] = _replays(connection)
    rows: dict[str, list[tuple[Any, ...]]] = {table.name: [] for table in PROJECTIONS}
    for replay, count in replays:
        user = replay.account.user_id
        account = _account(replay.account, kept.pop(user, None), held.get(user, 0))
        accounts, entries = accounts + 1, entries + count
        rows["account"].append(row_mapping.account_to_row(account))
        rows["lot"] += [row_mapping.lot_to_row(lot) for lot in replay.lots.values()]
        rows["consumption_hour"] += [(*key, *sums) for key, sums in replay.consumption.items()]
        if accounts % 1_000 == 0:
            _flush(connection, rows)
    for user, known in kept.items():  # accounts with settings or holds, and no entry yet
        rows["account"].append(row_mapping.account_to_row(_account(Account(user), known, held.get(user, 0))))
    _flush(connection, rows)
    return accounts, entries


def _account(made: Account, known: Account | None, held: int) -> Account:
    made.held_micros = held
    if known is not None:
        made.overdraft_limit_micros, made.has_budgets = known.overdraft_limit_micros, known.has_budgets
        made.low_level, made.version = known.low_level, known.version + 1
        made.updated_at = known.updated_at
    else:
        made.version = made.seq
    return made


def _replays(connection: psycopg.Connection[Any]) -> Iterator[tuple[Replay, int]]:
    replay, count = Replay(Account("")), 0
    with psycopg.ServerCursor(connection, "rebuild_entries") as cursor:
        cursor.itersize = 5_000
        for row in cursor.execute(ENTRIES, binary=True):
            entry = row_mapping.entry_from_row(row)
            if entry.user_id != replay.account.user_id:
                if count:
                    replay.finish()
                    yield replay, count
                replay, count = Replay(Account(entry.user_id)), 0
            replay.add(entry)
            count += 1
    if count:
        replay.finish()
        yield replay, count


def _flush(connection: psycopg.Connection[Any], rows: dict[str, list[tuple[Any, ...]]]) -> None:
    for table in PROJECTIONS:
        statement = f"COPY {table.name}_shadow ({', '.join(table.columns.keys())}) FROM STDIN (FORMAT BINARY)"
        with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            copy.set_types(row_mapping.copy_types(table))
            for row in rows[table.name]:
                copy.write_row(row)
        rows[table.name].clear()


def _compare(connection: psycopg.Connection[Any], table: str) -> list[str]:
    made, there = COMPARED[table].format("_shadow"), COMPARED[table].format("")
    lines = []
    for what, first, second in (("missing or wrong", made, there), ("not in the entries", there, made)):
        statement = f"({first}) EXCEPT ({second}) LIMIT {MOST_SHOWN}"
        found = connection.execute(statement.encode()).fetchall()
        lines += [f"{table}, {what}: {', '.join(map(str, row[:4]))}" for row in found]
    return lines
