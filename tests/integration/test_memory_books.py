"""The memory worker's pipeline on real PostgreSQL with scripted models: what it costs is what the ledger has, and what
has ended goes when its time has come, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from memory_worker.clients.hashed_embedder import HashedEmbedder, vector_of
from memory_worker.domain.item import MemoryType
from memory_worker.domain.job import JobState, Said, TurnText
from memory_worker.storage.decisions import PostgresDecisions
from memory_worker.storage.item_writer import ItemWriter
from memory_worker.storage.items import PostgresItems
from memory_worker.storage.jobs import PostgresJobs
from memory_worker.storage.upkeep import PostgresUpkeep
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.manage_items import ItemKeeper
from memory_worker.usecases.memory_ports import Looking, Retention
from memory_worker.usecases.ports import Policy, Turn
from memory_worker.usecases.vector_index import IndexSearch
from memory_worker.usecases.work_jobs import JobWorker
from servicekit.core.clock import SystemClock
from servicekit.core.faults import faults_from
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from tests.support.databases import Databases
from tests.support.ledger_models import LedgerModels

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
POLICY = Policy(agreeing=1, most_calls=100)
KEPT = Retention(answers=timedelta(days=7), ended_items=timedelta(days=90), ended_jobs=timedelta(days=400))


@dataclass
class Store:
    database: Database
    jobs: PostgresJobs
    items: PostgresItems
    decisions: PostgresDecisions
    upkeep: PostgresUpkeep
    embedders: Embedders
    keeper: ItemKeeper

    def worker(self, models: LedgerModels) -> JobWorker:
        return JobWorker(
            self.jobs, self.jobs, self.items, self.decisions, models, self.embedders,
            IndexSearch(None, clock=SystemClock()), opened=lambda job: job, policy=POLICY, owner="w", most_running=8,
            faults=faults_from(""),
        )

    async def rows(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        async with self.database.connection() as connection:
            return await (await connection.execute(statement, arguments)).fetchall()

    async def do(self, statement: str, *arguments: Any) -> None:
        async with self.database.connection() as connection:
            await connection.execute(statement, arguments)


@pytest.fixture
async def store(databases: Databases) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        database = Database(databases.make("memory"), schema="memory", application_name="test", pool_size=12)
        await database.open()
        stack.push_async_callback(database.close)
        clock, ids, writer = SystemClock(), RandomIdSource(), ItemWriter(database, tell_index=False)
        jobs, upkeep = PostgresJobs(database, ids), PostgresUpkeep(database, writer, clock=clock)
        items = PostgresItems(database, writer, clock=clock, tell_index=False)
        decisions = PostgresDecisions(database, writer, clock=clock, ids=ids)
        embedders = Embedders(HashedEmbedder(), upkeep, make=lambda _: None)
        await embedders.announce()
        yield Store(
            database, jobs, items, decisions, upkeep, embedders,
            ItemKeeper(items, decisions, jobs, embedders, policy=POLICY, clock=clock, ids=ids),
        )


def turn(user: str, number: int, text: str) -> Turn:
    return Turn(user, "c", f"m{number}", NOW + timedelta(seconds=number), TurnText((Said(3, text),)))


async def work_all(store: Store, worker: JobWorker, models: LedgerModels, count: int) -> None:
    running = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(90):
            while (await store.rows("SELECT count(*) FROM job WHERE state >= 4"))[0][0] < count:
                # Not to wait for the back-off; and now and then something late arrives.
                await store.do("UPDATE job SET due_at = now() WHERE state IN (1, 3)")
                models.settle()
                await asyncio.sleep(0.05)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("seed", range(4))
async def test_what_jobs_cost_is_what_the_ledger_has(store: Store, seed: int) -> None:
    """Acknowledgements lost, late and doubled: nothing is charged twice, nothing is missing."""
    models = LedgerModels(seed=seed, lost=0.3, late=0.5, doubled=0.5)
    turns = [
        turn(f"u{number % 4}", number, f"topic{number % 3}: value{number}. other{number % 5}: {number % 2}.")
        for number in range(24)
    ]
    await store.jobs.submit(turns)
    await work_all(store, store.worker(models), models, len(turns))
    models.settle()
    journal = await store.rows("SELECT call_id, user_id, credit_micros FROM model_answer")
    assert {call_id: (user_id, credit) for call_id, user_id, credit in journal} == models.ledger
    assert len(journal) == len(models.asked), "one charge for each question"
    assert sum(models.asked.values()) > len(journal), "and some were asked more than once"
    for user in {each.user_id for each in turns}:
        jobs = await store.jobs.list_jobs(user, state=None, before=None, limit=100)
        assert {each.state for each in jobs} == {JobState.DONE}
        charged = [credit for owner, credit in models.ledger.values() if owner == user]
        assert sum(each.credit_micros for each in jobs) == sum(charged)
        assert sum(each.calls for each in jobs) == len(charged)
    # What they decided is what was said last, each key once.
    active = await store.rows("SELECT user_id, content FROM item WHERE status = 1")
    keys = [(user, content.split(":")[0]) for user, content in active]
    assert len(keys) == len(set(keys)), "of two that contradict each other one is left"


async def test_what_has_ended_goes_in_its_time_and_nothing_else(store: Store) -> None:
    models = LedgerModels(seed=1, lost=0, late=0, doubled=0)
    said = ["town: Rome.", "town: Porto.", "drink: tea.", "town: Oslo."]
    await store.jobs.submit([turn("u", number, text) for number, text in enumerate(said)])
    await work_all(store, store.worker(models), models, len(said))

    async def count(table: str) -> int:
        return int((await store.rows(f"SELECT count(*) FROM {table}"))[0][0])

    active = {"town: Oslo", "drink: tea"}
    assert await count("item") == await count("embedding") == 4
    assert await store.upkeep.prune(KEPT, limit=100) == {"model_answer": 0, "item": 0, "job": 0}
    # Porto was superseded a hundred days ago.
    await store.do("UPDATE item SET updated_at = now() - interval '100 days' WHERE content = 'town: Porto'")
    [(porto,)] = await store.rows("SELECT item_id FROM item WHERE content = 'town: Porto'")
    for limit in (1, 1, 100):
        await store.upkeep.prune(KEPT, limit=limit)
    assert await count("item") == await count("embedding") == 3
    assert await store.rows("SELECT 1 FROM item_version WHERE item_id = %s", porto) == []
    # Its decision also closed Rome, and Oslo's closed it: both items are there, and so are their reasons.
    assert await count("decision") == 4
    # The others, too: what no item stands upon goes with them, what wrote a living one stays.
    await store.do("UPDATE item SET updated_at = now() - interval '100 days'")
    await store.upkeep.prune(KEPT, limit=100)
    assert {content for (content,) in await store.rows("SELECT content FROM item")} == active
    assert await count("embedding") == 2
    living = await store.rows("SELECT item_id FROM item")
    for (item_id,) in living:
        decision, text = await store.keeper.explain("u", decision_id=None, item_id=item_id)
        assert text
        assert item_id in decision.items
    # Answers after a week, jobs after a year and more, what explains a living memory never.
    await store.do("UPDATE model_answer SET answered_at = now() - interval '8 days'")
    assert (await store.upkeep.prune(KEPT, limit=100))["model_answer"] > 0
    assert await count("model_answer") == 0
    await store.do("UPDATE job SET ended_at = now() - interval '500 days'")
    assert (await store.upkeep.prune(KEPT, limit=100))["job"] == 4
    assert await count("job") == 0
    for (item_id,) in living:
        assert (await store.keeper.explain("u", decision_id=None, item_id=item_id))[1]
    assert await count("decision") == 2
    forever = replace(KEPT, ended_items=None, ended_jobs=None)
    await store.do("UPDATE item SET status = 3, updated_at = 'epoch'")
    assert await store.upkeep.prune(forever, limit=100) == {"model_answer": 0}
    assert await count("item") == 2


async def test_a_job_that_runs_is_not_pruned(store: Store) -> None:
    await store.jobs.submit([turn("u", 1, "town: Rome.")])
    await store.jobs.claim("w", limit=1, lease=timedelta(seconds=30))
    await store.do("UPDATE job SET created_at = 'epoch', occurred_at = 'epoch'")
    assert (await store.upkeep.prune(KEPT, limit=100))["job"] == 0


async def test_vectors_of_another_length_under_the_same_name_are_passed_over(store: Store) -> None:
    """As when another model was put behind the same alias."""
    made = await store.keeper.create("u", MemoryType.FACT, "likes tea", actor="t")
    other = await store.keeper.create("u", MemoryType.FACT, "likes green tea", actor="t")
    await store.do("UPDATE embedding SET vector = '[1,2,3]' WHERE item_id = %s", other.item_id)
    looking = Looking(vector_of("tea"), HashedEmbedder.name)
    outlook = await store.items.look(
        "u", looking, types=list(MemoryType), most=5, floor=-1.0, most_constraints=5
    )
    assert [item.item_id for item, _ in outlook.near] == [made.item_id]
    near = await store.items.similarities("u", looking.vector, looking.embedder, [made.item_id, other.item_id])
    assert set(near) == {made.item_id}
