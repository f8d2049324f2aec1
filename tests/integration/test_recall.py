"""Whether the memory that a new one is about is among the candidates: real MiniLM, real PostgreSQL, real Milvus, on
labelled pairs with distractors of the same person."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from memory_worker.clients.hashed_embedder import HashedEmbedder, vector_of
from memory_worker.clients.milvus import MilvusIndex
from memory_worker.clients.minilm import MiniLmEmbedder
from memory_worker.domain.item import Fact, Item, ItemStatus, MemoryType
from memory_worker.storage.decisions import PostgresDecisions
from memory_worker.storage.item_writer import ItemWriter
from memory_worker.storage.items import PostgresItems
from memory_worker.usecases.memory_ports import IndexEntry, Looking, Vector
from servicekit.core.clock import SystemClock
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from tests.support.databases import Databases
from tests.support.milvus import Milvus
from tests.support.pairs import RELATIONS, distractors, labelled_pairs

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
DISTRACTORS = 200
MOST = 5
USER = "u"
LEAST = {"duplicate": 0.98, "update": 0.98, "conflict": 0.95}


@pytest.fixture(scope="module")
def minilm() -> MiniLmEmbedder:
    return MiniLmEmbedder()


@dataclass
class Store:
    items: PostgresItems
    decisions: PostgresDecisions


@pytest.fixture
async def store(databases: Databases) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        database = Database(databases.make("memory"), schema="memory", application_name="test", pool_size=4)
        await database.open()
        stack.push_async_callback(database.close)
        clock, writer = SystemClock(), ItemWriter(database, tell_index=False)
        yield Store(
            PostgresItems(database, writer, clock=clock, tell_index=False),
            PostgresDecisions(database, writer, clock=clock, ids=RandomIdSource()),
        )


def item_of(content: str) -> Item:
    return Item(
        user_id=USER, item_id=uuid.uuid4(), type=MemoryType.FACT, title="t", content=content, confidence=1.0,
        importance=0.5, sensitivity=0, is_explicit=True, status=ItemStatus.ACTIVE, version=1, valid_from=NOW,
        valid_to=None, expires_at=None, created_at=NOW, updated_at=NOW,
    )


def fact_of(content: str) -> Fact:
    return Fact(MemoryType.FACT, "t", content, 1.0, 0.5, 0, True)


def test_the_vectors_are_the_published_ones(minilm: MiniLmEmbedder) -> None:
    """As the documentation of sentence-transformers prints them for all-MiniLM-L6-v2."""
    made = minilm.vectors(["This is an example sentence", "Each sentence is converted"])
    assert made[0][:5] == pytest.approx([0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374481], abs=2e-6)
    assert sum(value * value for value in made[1]) == pytest.approx(1.0, abs=1e-5)
    alone = minilm.vectors(["This is an example sentence"])[0]
    assert alone == pytest.approx(made[0], abs=1e-6), "padding of a batch changes nothing"
    assert len(minilm.vectors(["word " * 5000])[0]) == 384
    assert len(minilm.vectors([""])[0]) == 384


async def fill(store: Store, contents: list[str], vectors: dict[str, list[Vector]]) -> dict[str, Item]:
    made = {}
    for number, content in enumerate(contents):
        item = item_of(content)
        made[content] = await store.items.create(
            item, {name: those[number] for name, those in vectors.items()}, actor="t", idempotency_key=""
        )
    return made


async def test_recall_on_labelled_pairs(store: Store, minilm: MiniLmEmbedder, milvus: Milvus) -> None:
    pairs = labelled_pairs()
    assert {name: sum(relation == name for *_, relation in pairs) for name in RELATIONS} == dict.fromkeys(RELATIONS, 60)
    contents = [*dict.fromkeys(old for old, _, _ in pairs), *distractors(DISTRACTORS)]
    vectors = {minilm.name: minilm.vectors(contents), HashedEmbedder.name: [vector_of(text) for text in contents]}
    known = await fill(store, contents, vectors)
    index = MilvusIndex(milvus.uri, token="", prefix="t_", search_seconds=5, seconds=10)
    await index.put(minilm.name, [
        IndexEntry(USER, known[text].item_id, MemoryType.FACT, 1, vector)
        for text, vector in zip(contents, vectors[minilm.name], strict=True)
    ])
    hits: dict[tuple[str, str], int] = {}
    overlaps: list[float] = []
    looked_up = {minilm.name: minilm.vectors([new for _, new, _ in pairs]),
                 HashedEmbedder.name: [vector_of(new) for _, new, _ in pairs]}
    floors = {minilm.name: minilm.floors.recall, HashedEmbedder.name: HashedEmbedder.floors.recall}
    for number, (old, new, relation) in enumerate(pairs):
        for name, those in looked_up.items():
            recall = await store.decisions.recall(
                USER, fact_of(new), Looking(those[number], name), most=MOST, floor=floors[name]
            )
            found = [item.item_id for item, _ in recall.candidates]
            hits[relation, name] = hits.get((relation, name), 0) + (known[old].item_id in found)
            if name != minilm.name:
                continue
            near = await index.search(name, USER, those[number], types=[MemoryType.FACT], most=MOST + 10)
            proposed = await store.decisions.recall(
                USER, fact_of(new), Looking(those[number], name, near), most=MOST, floor=floors[name]
            )
            assert not proposed.scanned
            same = {item.item_id for item, _ in proposed.candidates} & set(found)
            overlaps.append(len(same) / len(found) if found else 1.0)
    index.close()
    for relation, least in LEAST.items():
        assert hits[relation, minilm.name] / 60 >= least, (relation, hits)
        assert hits[relation, minilm.name] >= hits[relation, HashedEmbedder.name], "what a model is for"
    assert hits["unrelated", minilm.name] / 60 <= 0.2, "what is not about it costs a question each"
    assert sum(overlaps) / len(overlaps) >= 0.99, "the index answers as the exact comparison does"
