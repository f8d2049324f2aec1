"""One suite over the store in memory and the one on PostgreSQL, through the writer that both serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from metering.usage import Usage
from servicekit.core.clock import ManualClock
from servicekit.core.errors import DependencyUnavailable
from servicekit.core.faults import NoFaults
from servicekit.core.offsets import OffsetMove, StaleConsumer
from servicekit.db.database import Database
from tests.support.databases import Databases
from tests.support.memory_store import FixedPrices, MemoryBooks
from tests.unit.tokenstore.test_book import NOW, PRICES, adjust, charge, open_hold
from tokenstore_service.domain.commands import (
    Booked,
    ChargeRecorded,
    ExpireHold,
    ExtendHold,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    RecordStatus,
    ReleaseHold,
)
from tokenstore_service.domain.hold import HoldState
from tokenstore_service.storage.book_store import PostgresBookStore
from tokenstore_service.storage.tables import SCHEMA
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.announcements import announcement_of
from tokenstore_service.wire.charges import issue_original


@pytest.fixture(params=["memory", "postgresql"])
async def writer(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[BookWriter]:
    clock = ManualClock(NOW)
    store: Any = MemoryBooks()
    database = None
    if request.param == "postgresql":
        database = Database(
            databases.make("tokenstore"), schema=SCHEMA, application_name="test", pool_size=2, by_key_only=True
        )
        await database.open()
        async with database.connection() as connection:
            await connection.execute("INSERT INTO consumer_offset VALUES ('t', 0, 0), ('t', 1, 0)")
        store = PostgresBookStore(database, encode_issue=issue_original, announce=announcement_of)
    made = BookWriter(store, FixedPrices(PRICES), clock=clock, faults=NoFaults())
    made.test_clock = clock  # type: ignore[attr-defined]
    yield made
    await made.close()
    if database is not None:
        await database.close()


async def test_a_call_from_hold_to_charge(writer: BookWriter) -> None:
    adjusted = await writer.apply(adjust(10**9), Booked)
    assert adjusted.account.balance_micros == 10**9
    granted = await writer.apply(open_hold(1, request_id="r"), HoldGranted)
    assert granted.quote is not None
    refused = await writer.apply(open_hold(2, request_id="r"), HoldRefused)
    assert refused.reason == "REQUEST_IN_FLIGHT"
    recorded = await writer.apply(charge(1, request_id="r", quote=granted.quote), ChargeRecorded)
    assert (recorded.status, recorded.seq, recorded.credit_micros) == (RecordStatus.APPLIED, 2, 35_200)
    again = await writer.apply(charge(1, request_id="r"), ChargeRecorded)
    assert (again.status, again.seq) == (RecordStatus.DUPLICATE, 2)
    conflict = await writer.apply(charge(1, usage=Usage(output_tokens=1)), ChargeRecorded)
    assert conflict.status is RecordStatus.CONFLICT
    finished = await writer.apply(open_hold(3, request_id="r"), HoldRefused)
    assert (finished.reason, finished.existing_call_id) == ("REQUEST_FINISHED", str(UUID(int=1)))


async def test_holds_are_extended_released_and_expired_once(writer: BookWriter) -> None:
    await writer.apply(adjust(10**9), Booked)
    await writer.apply_all([open_hold(number) for number in (1, 2, 3)])
    extended = await writer.apply(ExtendHold("u", UUID(int=1), timedelta(seconds=100)), HoldChanged)
    assert extended.state is HoldState.OPEN
    writer.test_clock.advance(seconds=61)  # type: ignore[attr-defined]
    states = [answer.state for answer in await writer.apply_all([
        ExpireHold("u", UUID(int=1)), ReleaseHold("u", UUID(int=2)), ExpireHold("u", UUID(int=3)),
        ReleaseHold("u", UUID(int=3)), ReleaseHold("u", UUID(int=9)),
    ]) if isinstance(answer, HoldChanged)]
    assert states == [HoldState.OPEN, HoldState.RELEASED, HoldState.EXPIRED, HoldState.EXPIRED, None]
    late = await writer.apply(charge(3), ChargeRecorded)
    assert late.status is RecordStatus.APPLIED


async def test_concurrent_callers_share_batches_and_never_overspend(writer: BookWriter) -> None:
    await writer.apply(adjust(163_200 * 10), Booked)
    answers = await asyncio.gather(*[
        writer.apply_all([open_hold(number, min_output_tokens=100)]) for number in range(1, 101)
    ])
    granted = [answer for (answer,) in answers if isinstance(answer, HoldGranted)]
    assert len(granted) == 10


async def test_offsets_move_with_the_effects_and_a_zombie_changes_nothing(writer: BookWriter) -> None:
    await writer.apply_all([charge(1)], [OffsetMove("t", 0, 0, 1), OffsetMove("t", 1, 0, 5)])
    zombie = writer.apply_all([charge(2)], [OffsetMove("t", 0, 0, 1)])
    innocent = writer.apply_all([charge(3)])
    results = await asyncio.gather(zombie, innocent, return_exceptions=True)
    assert isinstance(results[0], StaleConsumer)
    assert not isinstance(results[1], BaseException)
    (again,) = await writer.apply_all([charge(2)], [OffsetMove("t", 0, 1, 2)])
    assert isinstance(again, ChargeRecorded)
    assert again.status is RecordStatus.APPLIED


@pytest.mark.parametrize("where", ["fail_before", "fail_after"])
async def test_a_commit_in_doubt_is_tried_again_and_booked_once(where: str) -> None:
    books = MemoryBooks()
    writer = BookWriter(books, FixedPrices(PRICES), clock=ManualClock(NOW), faults=NoFaults())
    setattr(books, where, 2)
    recorded = await writer.apply(charge(1), ChargeRecorded)
    assert recorded.status in (RecordStatus.APPLIED, RecordStatus.DUPLICATE)
    assert recorded.credit_micros == 35_200
    assert len(books.entries) == 1
    books.fail_before = 100
    with pytest.raises(DependencyUnavailable):
        await writer.apply(charge(2), ChargeRecorded)
