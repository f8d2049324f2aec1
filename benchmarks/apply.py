"""The apply path alone: the one writer on a real database, no RPC and no broker, as the consumer drives it."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time

import psycopg

from metering.usage import Usage
from servicekit.core.clock import SystemClock
from servicekit.core.faults import NoFaults
from servicekit.core.ids import RandomIdSource
from servicekit.core.offsets import OffsetMove
from servicekit.db.database import Database
from tokenstore_service.domain.commands import AdjustBalance, Booked, RecordCharge
from tokenstore_service.storage.book_store import PostgresBookStore
from tokenstore_service.storage.price_rules import FollowedPrices
from tokenstore_service.storage.tables import SCHEMA
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.announcements import announcement_of
from tokenstore_service.wire.charges import issue_original

LOT_MICROS = 10**15


async def run(url: str, *, users: int, lots: int, batch_size: int, count: int, lot_micros: int) -> dict[str, float]:
    """Charges per second with hash chain, lots, sums by hour and a consumer offset in each transaction, fsync on."""
    database = Database(url, schema=SCHEMA, application_name="bench", pool_size=4, by_key_only=True)
    await database.open()
    prices = FollowedPrices(database)
    await prices.refresh()
    clock, ids = SystemClock(), RandomIdSource()
    writer = BookWriter(
        PostgresBookStore(database, encode_issue=issue_original, announce=announcement_of), prices, clock=clock,
        faults=NoFaults(),
    )
    async with database.connection() as connection:
        await connection.execute("INSERT INTO consumer_offset VALUES ('bench', 0, 0) ON CONFLICT DO NOTHING")
        await connection.execute("UPDATE consumer_offset SET next_offset = 0")
    names = [f"bench-{number}" for number in range(users)]
    for begin in range(0, users, 100):
        await writer.apply_all([
            AdjustBalance(user, lot_micros, "bench", "bench", f"lot-{lot}")
            for user in names[begin:begin + 100] for lot in range(lots)
        ])
    now = clock.now()
    usage = Usage(input_tokens=100, output_tokens=50)
    charges = [
        RecordCharge(
            event_id=str(ids.new_id()), user_id=names[number % users], call_id=None, request_id="", scene="chat",
            provider="LOCAL", model="pro", usage=usage, quote=None, occurred_at=now,
        )
        for number in range(count)
    ]
    gc.collect()
    gc.freeze()  # as a server does before it serves
    with psycopg.connect(url, autocommit=True) as connection_:
        def state() -> tuple[int, int]:
            row = connection_.execute(
                "SELECT pg_current_wal_insert_lsn() - '0/0', sum(pg_total_relation_size(name::regclass))::bigint"
                " FROM unnest(ARRAY['tokenstore.ledger_entry', 'tokenstore.consumption_hour', 'tokenstore.account',"
                " 'tokenstore.lot']) AS name"
            ).fetchone()
            assert row is not None
            return int(row[0]), int(row[1])

        wal, size = state()
        cpu, begun = time.process_time(), time.perf_counter()
        for begin in range(0, count, batch_size):
            batch = charges[begin:begin + batch_size]
            answers = await writer.apply_all(batch, [OffsetMove("bench", 0, begin, begin + len(batch))])
            assert not any(isinstance(answer, Exception | Booked) for answer in answers)
        seconds = time.perf_counter() - begun
        cpu = time.process_time() - cpu
        wal_after, size_after = state()
    await writer.close()
    await database.close()
    return {
        "rate": count / seconds, "cpu_ms": cpu * 1000 / count, "wal_bytes": (wal_after - wal) / count,
        "table_bytes": (size_after - size) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--lots", type=int, default=1)
    parser.add_argument("--lot-micros", type=int, default=LOT_MICROS)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--count", type=int, default=50_000)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(run(
        os.environ["BENCH_DATABASE_URL"], users=arguments.users, lots=arguments.lots, batch_size=arguments.batch_size,
        count=arguments.count, lot_micros=arguments.lot_micros,
    ))))


if __name__ == "__main__":
    main()
