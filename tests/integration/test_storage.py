"""Schemas, tampering, the outbox relay and consumer offsets on real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine

import llm_service.storage.tables
import memory_worker.storage.tables
import tokenstore_service.storage.tables
from servicekit.core.clock import SystemClock
from servicekit.core.errors import DependencyUnavailable
from servicekit.core.faults import NoFaults
from servicekit.core.offsets import OffsetMove, StaleConsumer
from servicekit.db.database import Database
from servicekit.kafka.offsets import load_offsets, move_offsets
from servicekit.outbox.message import LANES, OutboxMessage, lane_of
from servicekit.outbox.relay import OutboxRelay
from servicekit.telemetry.metrics import OutboxMetrics
from tests.support.databases import SCHEMAS, Databases
from tests.support.memory_store import FixedPrices
from tests.unit.tokenstore.test_book import PRICES, adjust, charge, open_hold
from tokenstore_service.domain.verification import Finding
from tokenstore_service.storage.book_store import PostgresBookStore
from tokenstore_service.storage.ledger_reader import PostgresLedgerReader
from tokenstore_service.usecases.verify_ledger import verify_ledger
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.announcements import announcement_of
from tokenstore_service.wire.charges import issue_original

TABLES = {
    "tokenstore": tokenstore_service.storage.tables, "llm": llm_service.storage.tables,
    "memory": memory_worker.storage.tables,
}


@pytest.mark.parametrize("service", ["tokenstore", "llm", "memory"])
def test_migrations_make_what_the_code_expects(databases: Databases, service: str) -> None:
    schema, _ = SCHEMAS[service]
    url = databases.make(service).replace("postgresql://", "postgresql+psycopg://")
    engine = create_engine(url, connect_args={"options": f"-c search_path={schema}"})
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={
            "compare_type": True, "include_name": lambda name, kind, _parents: name != "alembic_version",
        })
        assert compare_metadata(context, TABLES[service].METADATA) == []
    engine.dispose()


@pytest.fixture
async def books(databases: Databases) -> AsyncIterator[tuple[BookWriter, PostgresLedgerReader, str]]:
    url = databases.make("tokenstore")
    database = Database(url, schema="tokenstore", application_name="test", pool_size=3)
    await database.open()
    writer = BookWriter(
        PostgresBookStore(database, encode_issue=issue_original, announce=announcement_of), FixedPrices(PRICES),
        clock=SystemClock(), faults=NoFaults(),
    )
    yield writer, PostgresLedgerReader(database), url
    await writer.close()
    await database.close()


async def findings(reader: PostgresLedgerReader, user: str | None = None) -> list[str]:
    return [piece.kind async for piece in verify_ledger(reader, user) if isinstance(piece, Finding)]


TAMPERINGS: dict[str, tuple[str, set[str]]] = {
    "a changed amount": (
        "UPDATE ledger_entry SET amount_micros = amount_micros + 1 WHERE user_id = 'u' AND seq = 2", {"HASH_MISMATCH"}
    ),
    "a removed row": ("DELETE FROM ledger_entry WHERE user_id = 'u' AND seq = 2", {"SEQ_GAP", "HASH_MISMATCH"}),
    "a removed last row": ("DELETE FROM ledger_entry WHERE user_id = 'u' AND seq = 4", {"HEAD_MISMATCH"}),
    "swapped rows": (
        """UPDATE ledger_entry SET seq = seq + 1000 WHERE user_id = 'u' AND seq IN (2, 3);
        UPDATE ledger_entry SET seq = 1005 - seq WHERE user_id = 'u' AND seq > 1000""", {"HASH_MISMATCH"}
    ),
    "a changed balance": (
        "UPDATE account SET balance_micros = balance_micros + 5 WHERE user_id = 'u'", {"BALANCE_MISMATCH"}
    ),
    "an inserted row": (
        """INSERT INTO ledger_entry SELECT (r).* FROM (SELECT jsonb_populate_record(e, '{"seq": 5, "event_id": "x"}') AS r
        FROM ledger_entry AS e WHERE user_id = 'u' AND seq = 4) AS made""", {"HASH_MISMATCH", "HEAD_MISMATCH"}
    ),
    "a changed usage": ("UPDATE ledger_entry SET output_tokens = 1 WHERE user_id = 'u' AND seq = 3", {"HASH_MISMATCH"}),
    "a changed rate": ("UPDATE ledger_entry SET output_pico = 1 WHERE user_id = 'u' AND seq = 3", {"HASH_MISMATCH"}),
    "a changed total": (
        "UPDATE account SET total_consumed_micros = 0 WHERE user_id = 'u'", {"TOTALS_MISMATCH"}
    ),
    "a vanished hold": ("DELETE FROM hold WHERE user_id = 'u' AND state = 1", {"HELD_MISMATCH"}),
    "a vanished account": ("DELETE FROM account WHERE user_id = 'u'", {"ORPHAN_ENTRIES"}),
    "a changed head": ("UPDATE account SET head_hash = decode(repeat('00', 32), 'hex') WHERE user_id = 'u'",
                       {"HEAD_MISMATCH"}),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
async def test_verification_finds_every_kind_of_tampering(books: Any, tampering: str) -> None:
    writer, reader, url = books
    await writer.apply_all([
        adjust(10**9), charge(1), charge(2), charge(3), open_hold(9), adjust(5, user="innocent"),
    ])
    assert await findings(reader) == []
    statement, kinds = TAMPERINGS[tampering]
    with psycopg.connect(url, autocommit=True, options="-c search_path=tokenstore") as connection:
        connection.execute(statement.encode())
    found = await findings(reader)
    assert kinds <= set(found), found
    assert await findings(reader, "innocent") == []
    assert await findings(reader, "u") == found


class Receiver:
    """Takes messages, or is down, or refuses some keys."""

    def __init__(self) -> None:
        self.taken: list[OutboxMessage] = []
        self.down = False
        self.refused_keys: set[str] = set()

    async def publish(self, messages: Sequence[OutboxMessage]) -> Sequence[Exception | None]:
        if self.down:
            raise DependencyUnavailable("receiver")
        outcomes: list[Exception | None] = []
        for message in messages:
            refused = message.key in self.refused_keys
            outcomes.append(ValueError("refused") if refused else None)
            if not refused:
                self.taken.append(message)
        return outcomes


@pytest.fixture
async def outbox(databases: Databases) -> AsyncIterator[Database]:
    database = Database(databases.make("llm"), schema="llm", application_name="test", pool_size=4)
    await database.open()
    yield database
    await database.close()


async def put(database: Database, *keys: str) -> None:
    async with database.connection() as connection:
        for key in keys:
            await connection.execute(
                "INSERT INTO outbox_message (lane, key, event_id, event_type, topic, payload)"
                " VALUES (%s, %s, %s, 'e', 't', '')", (lane_of(key), key, str(uuid4())),
            )


async def waiting(database: Database) -> int:
    async with database.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM outbox_message")).fetchone()
        assert row is not None
        return int(row[0])


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not (await result if asyncio.iscoroutine(result := condition()) else result):
            await asyncio.sleep(0.02)


def relay_of(database: Database, receiver: Receiver, owner: str = "one") -> OutboxRelay:
    return OutboxRelay(
        database, receiver, owner=owner, metrics=OutboxMetrics(CollectorRegistry()), clock=SystemClock()
    )


async def nothing_waits(database: Database) -> bool:
    return await waiting(database) == 0


async def test_messages_arrive_in_order_per_key_and_are_pruned(outbox: Database) -> None:
    receiver = Receiver()
    await put(outbox, *[f"user-{number % 7}" for number in range(100)])
    task = asyncio.create_task(relay_of(outbox, receiver).run())
    await until(lambda: nothing_waits(outbox))
    task.cancel()
    assert len(receiver.taken) == 100
    for key in {message.key for message in receiver.taken}:
        ids = [message.message_id for message in receiver.taken if message.key == key]
        assert ids == sorted(ids)


async def test_a_receiver_that_is_down_gets_everything_when_it_is_back(outbox: Database) -> None:
    receiver = Receiver()
    receiver.down = True
    await put(outbox, *"abc")
    task = asyncio.create_task(relay_of(outbox, receiver).run())
    await asyncio.sleep(0.5)
    assert await waiting(outbox) == 3
    receiver.down = False
    await until(lambda: nothing_waits(outbox))
    task.cancel()
    assert sorted(message.key for message in receiver.taken) == ["a", "b", "c"]


async def test_a_key_that_fails_does_not_hold_up_the_others_and_keeps_its_order(outbox: Database) -> None:
    receiver = Receiver()
    receiver.refused_keys = {"bad"}
    await put(outbox, "bad", "good", "bad", "good")
    task = asyncio.create_task(relay_of(outbox, receiver).run())
    await until(lambda: len(receiver.taken) == 2)
    assert {message.key for message in receiver.taken} == {"good"}
    receiver.refused_keys = set()
    await until(lambda: nothing_waits(outbox))
    task.cancel()
    ids = [message.message_id for message in receiver.taken if message.key == "bad"]
    assert len(ids) == 2
    assert ids == sorted(ids)


async def test_replicas_share_the_lanes_and_one_takes_over_from_another(outbox: Database) -> None:
    first, second = Receiver(), Receiver()
    relays = [relay_of(outbox, first, "one"), relay_of(outbox, second, "two")]
    for _ in range(3):
        for relay in relays:
            await relay.claim()
    async with outbox.connection() as connection:
        owners = await (await connection.execute("SELECT owner, count(*) FROM outbox_lane GROUP BY 1")).fetchall()
    assert dict(owners) == {"one": LANES // 2, "two": LANES // 2}
    await put(outbox, *[f"user-{number}" for number in range(200)])
    tasks = [asyncio.create_task(relay.run()) for relay in relays]
    await until(lambda: nothing_waits(outbox))
    assert first.taken
    assert second.taken
    assert len(first.taken) + len(second.taken) == 200
    await relays[0].leave(flush_seconds=1)
    await until(lambda: tasks[0].done())
    await put(outbox, *[f"user-{number}" for number in range(200)])
    await until(lambda: nothing_waits(outbox))
    tasks[1].cancel()


async def test_stored_offsets_fence_a_zombie(databases: Databases) -> None:
    database = Database(databases.make("tokenstore"), schema="tokenstore", application_name="test", pool_size=2)
    await database.open()
    assert await load_offsets(database, [("t", 0), ("t", 1)]) == {("t", 0): 0, ("t", 1): 0}
    async with database.transaction() as connection:
        await move_offsets(connection, [OffsetMove("t", 0, 0, 10), OffsetMove("t", 1, 0, 3)])
    with pytest.raises(StaleConsumer):
        async with database.transaction() as connection:
            await move_offsets(connection, [OffsetMove("t", 1, 3, 4), OffsetMove("t", 0, 5, 20)])
    assert await load_offsets(database, [("t", 0), ("t", 1)]) == {("t", 0): 10, ("t", 1): 3}
    await database.close()


async def test_a_database_that_is_away_is_a_dependency_error(databases: Databases) -> None:
    database = Database(
        "postgresql://postgres@/x?host=/nowhere", schema="x", application_name="test", pool_size=2, connect_seconds=0.5
    )
    opening = asyncio.create_task(database.open())
    await asyncio.sleep(0.1)
    with pytest.raises(DependencyUnavailable):
        async with database.connection():
            pass
    opening.cancel()
    await database.close()


async def test_a_transaction_that_lasts_too_long_is_ended_by_the_server(databases: Databases) -> None:
    database = Database(
        databases.make("memory"), schema="memory", application_name="test", pool_size=1, transaction_seconds=0.2
    )
    await database.open()
    try:
        with pytest.raises(DependencyUnavailable):
            async with database.transaction() as connection:
                await connection.execute("INSERT INTO user_head (user_id, revision) VALUES ('u', 1)")
                await asyncio.sleep(0.6)
                await connection.execute("SELECT 1")
        async with database.connection() as connection:
            rows = await (await connection.execute("SELECT count(*) FROM user_head")).fetchall()
        assert rows == [(0,)]
    finally:
        await database.close()
