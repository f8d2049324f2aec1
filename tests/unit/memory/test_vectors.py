"""Embedders that change, and an index that is away: by a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from memory_worker.domain.item import Item, ItemStatus, MemoryType
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.memory_ports import Embedded, Embedder, Floors, IndexAway, IndexChange, IndexEntry, Vector
from memory_worker.usecases.ports import ModelCallFailed
from memory_worker.usecases.vector_index import REST_SECONDS, SPARE, IndexKeeper, IndexSearch
from servicekit.core.clock import ManualClock
from servicekit.core.errors import DependencyUnavailable

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


class FakeEmbedder:
    charges = False
    floors = Floors(0.1, 0.1)

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[tuple[str, bool]] = []
        self.fails = False

    async def embed(
        self, user_id: str, texts: Sequence[str], *, request_id: str, skip_charge: bool = False
    ) -> Embedded:
        if self.fails:
            raise ModelCallFailed("TRANSIENT", "AWAY")
        self.asked.append((request_id, skip_charge))
        return Embedded([(float(len(text)), float(len(self.name))) for text in texts])


class FakeUpkeep:
    """Of Upkeep what embedders need."""

    def __init__(self, items: Sequence[Item] = ()) -> None:
        self.serving, self.filling = "", ""
        self.items = list(items)
        self.vectors: dict[tuple[UUID, str], Vector] = {}
        self.settled = False

    async def announce(self, embedder: str) -> None:
        if not self.serving:
            self.serving = embedder
        self.filling = "" if embedder == self.serving else embedder

    async def embedders(self) -> tuple[str, str]:
        return self.serving, self.filling

    async def unindexed(self, embedder: str, *, limit: int) -> list[Item]:
        return [item for item in self.items if (item.item_id, embedder) not in self.vectors][:limit]

    async def set_vector(self, item: Item, embedder: str, vector: Vector) -> None:
        self.vectors[item.item_id, embedder] = vector

    async def switch(self, embedder: str, *, settled: timedelta) -> bool:
        if not self.settled or await self.unindexed(embedder, limit=1):
            return False
        self.serving, self.filling = embedder, ""
        return True


def item_of(content: str) -> Item:
    return Item(
        user_id="u", item_id=uuid4(), type=MemoryType.FACT, title="t", content=content, confidence=1.0, importance=1.0,
        sensitivity=0, is_explicit=True, status=ItemStatus.ACTIVE, version=1, valid_from=NOW, valid_to=None,
        expires_at=None, created_at=NOW, updated_at=NOW,
    )


def embedders_of(wanted: FakeEmbedder, upkeep: Any, *others: FakeEmbedder) -> Embedders:
    known: dict[str, Embedder] = {each.name: each for each in others}
    return Embedders(wanted, upkeep, make=known.get)


async def test_the_first_embedder_serves_at_once() -> None:
    old = FakeEmbedder("old")
    embedders = embedders_of(old, FakeUpkeep())
    await embedders.announce()
    assert embedders.serving is old
    assert embedders.filling is None
    assert await embedders.vectors("u", "four", lambda name: f"k:{name}") == {"old": (4.0, 3.0)}
    assert old.asked == [("k:old", False)]


async def test_a_new_embedder_is_filled_in_uncharged_and_then_serves() -> None:
    old, new, upkeep = FakeEmbedder("old"), FakeEmbedder("newer"), FakeUpkeep([item_of("a"), item_of("bb")])
    await embedders_of(old, upkeep).announce()
    embedders = embedders_of(new, upkeep, old)
    await embedders.announce()
    assert embedders.serving is old
    assert set(await embedders.vectors("u", "x", str, known={"old": (1.0,)})) == {"old", "newer"}
    assert old.asked == []
    assert new.asked == [("newer", True)], "what is filled in is not the user's to pay"
    await embedders.fill()
    assert embedders.serving is old, "not before every replica can know of it"
    assert {name for _, name in upkeep.vectors} == {"old", "newer"}
    upkeep.settled = True
    await embedders.fill()
    assert embedders.serving is new
    assert embedders.filling is None


async def test_a_vector_that_was_made_before_the_switch_is_not_taken_for_the_new_ones() -> None:
    old, new, upkeep = FakeEmbedder("old"), FakeEmbedder("newer"), FakeUpkeep()
    await embedders_of(old, upkeep).announce()
    embedders = embedders_of(new, upkeep, old)
    await embedders.announce()
    before = await embedders.vectors("u", "four", str)
    upkeep.settled = True
    await embedders.fill()
    assert await embedders.vectors("u", "four", str, known={"old": before["old"]}) == {"newer": (4.0, 5.0)}


async def test_a_new_embedder_that_fails_harms_nothing() -> None:
    old, new, upkeep = FakeEmbedder("old"), FakeEmbedder("newer"), FakeUpkeep([item_of("a")])
    await embedders_of(old, upkeep).announce()
    embedders = embedders_of(new, upkeep, old)
    await embedders.announce()
    new.fails, upkeep.settled = True, True
    assert await embedders.vectors("u", "four", str) == {"old": (4.0, 3.0)}
    await embedders.fill()
    assert embedders.serving is old
    new.fails = False
    await embedders.fill()
    assert embedders.serving is new


async def test_a_process_that_can_not_make_the_serving_one_says_so() -> None:
    new, upkeep = FakeEmbedder("newer"), FakeUpkeep()
    await embedders_of(FakeEmbedder("exotic"), upkeep).announce()
    embedders = embedders_of(new, upkeep)
    await embedders.announce()
    assert not embedders.can_fill
    with pytest.raises(DependencyUnavailable, match="exotic"):
        await embedders.vectors("u", "x", str)


class FakeIndex:
    def __init__(self) -> None:
        self.away = False
        self.searches = 0
        self.rows: dict[UUID, int] = {}
        self.answers: list[UUID] = []
        self.let_go = asyncio.Event()
        self.let_go.set()

    def _check(self) -> None:
        if self.away:
            raise IndexAway("away")

    async def search(self, embedder: str, user_id: str, vector: Vector, *, types: Any, most: int) -> list[UUID]:
        self.searches += 1
        await self.let_go.wait()
        self._check()
        return self.answers[:most]

    async def put(self, embedder: str, entries: Sequence[IndexEntry]) -> None:
        self._check()
        self.rows |= {each.item_id: each.version for each in entries}

    async def remove(self, embedder: str, item_ids: Sequence[UUID]) -> None:
        self._check()
        for each in item_ids:
            self.rows.pop(each, None)

    async def forget(self, embedder: str, user_id: str) -> None:
        self._check()
        self.rows.clear()

    async def versions(self, embedder: str, item_ids: Sequence[UUID]) -> dict[UUID, int]:
        return {each: self.rows[each] for each in item_ids if each in self.rows}

    async def everything(self, embedder: str) -> Any:
        yield dict(self.rows)

    async def drop(self, embedder: str) -> None:
        self.rows.clear()


async def test_an_index_that_failed_rests_and_is_tried_by_one_search_at_a_time() -> None:
    index, clock, failures = FakeIndex(), ManualClock(), []
    index.answers = [uuid4() for _ in range(30)]
    search = IndexSearch(index, clock=clock, failed=lambda: failures.append(1))

    async def near() -> list[UUID] | None:
        return await search.near("e", "u", (1.0,), types=[MemoryType.FACT], most=5)

    assert await near() == index.answers[:5 + SPARE]
    index.away = True
    assert await near() is None
    assert [await near() for _ in range(10)] == [None] * 10
    assert (index.searches, len(failures)) == (2, 1), "nobody asks one that rests"
    clock.advance(seconds=REST_SECONDS)
    index.let_go.clear()
    probe = asyncio.create_task(near())
    await asyncio.sleep(0)
    assert await near() is None, "one tries it, the others do not wait for that"
    index.let_go.set()
    assert await probe is None
    assert index.searches == 3
    clock.advance(seconds=REST_SECONDS)
    index.away = False
    assert await near() == index.answers[:5 + SPARE]
    assert await near() is not None
    assert index.searches == 5


async def test_without_an_index_nothing_is_asked() -> None:
    search = IndexSearch(None, clock=ManualClock())
    assert not search.used
    assert await search.near("e", "u", (1.0,), types=[MemoryType.FACT], most=5) is None


class FakeOutbox:
    def __init__(self) -> None:
        self.items: dict[UUID, int] = {}
        self.queue: dict[UUID, int] = {}
        self.changes = 0

    def change(self, item_id: UUID, version: int | None) -> None:
        if version is None:
            self.items.pop(item_id)
        else:
            self.items[item_id] = version
        self.changes += 1
        self.queue[item_id] = self.changes

    async def claim(self, embedder: str, *, limit: int, lease: timedelta) -> list[IndexChange]:
        return [
            IndexChange("u", item_id, change, IndexEntry("u", item_id, MemoryType.FACT, self.items[item_id], (1.0,))
                        if item_id in self.items else None)
            for item_id, change in list(self.queue.items())[:limit]
        ]

    async def done(self, changes: Sequence[IndexChange]) -> None:
        for each in changes:
            if self.queue.get(each.item_id) == each.change:
                del self.queue[each.item_id]

    async def mark(self, items: Sequence[tuple[str, UUID]]) -> None:
        for _, item_id in items:
            self.changes += 1
            self.queue[item_id] = self.changes

    async def forget(self, user_id: str) -> None:
        self.queue.clear()

    async def waiting(self) -> int:
        return len(self.queue)

    async def live(self, embedder: str, *, after: Any, limit: int) -> list[tuple[str, UUID, int]]:
        ids = sorted(each for each in self.items if after is None or each > after[1])
        return [("u", each, self.items[each]) for each in ids[:limit]]

    async def versions(self, embedder: str, item_ids: Sequence[UUID]) -> dict[UUID, tuple[str, int]]:
        return {each: ("u", self.items[each]) for each in item_ids if each in self.items}


async def test_changes_reach_the_index_and_drift_is_found_both_ways_and_mended() -> None:
    index, outbox = FakeIndex(), FakeOutbox()
    keeper = IndexKeeper(index, outbox, serving=lambda: "e", clock=ManualClock())
    one, two, three, stray = (uuid4() for _ in range(4))
    for item_id in (one, two, three):
        outbox.change(item_id, 1)
    index.away = True
    with pytest.raises(IndexAway):
        await keeper.deliver()
    assert await keeper.waiting() == 3, "nothing is lost"
    assert not await keeper.forget("u")
    index.away = False
    assert await keeper.deliver() == 3
    assert await keeper.deliver() == 0
    outbox.change(three, None)
    await keeper.deliver()
    assert index.rows == {one: 1, two: 1}
    # Behind its back: one is lost, one is old, one is nobody's.
    del index.rows[one]
    index.rows[two], index.rows[stray] = 0, 9
    drift = await keeper.compare()
    assert (drift.missing, drift.stale, drift.orphaned) == (1, 1, 1)
    await keeper.deliver()
    assert index.rows == {one: 1, two: 1}
    drift = await keeper.compare()
    assert (drift.missing, drift.stale, drift.orphaned) == (0, 0, 0)
    assert keeper.drift == drift


async def test_the_index_is_compared_in_its_rhythm_and_at_once_when_another_embedder_serves() -> None:
    serving, clock = ["old"], ManualClock()
    keeper = IndexKeeper(FakeIndex(), FakeOutbox(), serving=lambda: serving[0], clock=clock)
    every = timedelta(seconds=600)
    assert await keeper.compare_when_due(every) is not None
    assert await keeper.compare_when_due(every) is None
    serving[0] = "new"
    assert await keeper.compare_when_due(every) is not None
    assert await keeper.compare_when_due(every) is None
    clock.advance(seconds=600)
    assert await keeper.compare_when_due(every) is not None
