"""What is worth knowing for a query."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from memory_worker.domain.item import Item, MemoryType
from memory_worker.domain.ranking import MOST_PINNED, Ranked, choose, rank
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.memory_ports import Embedder, ItemStore, Looking, Outlook, Vector
from memory_worker.usecases.ports import ModelCallFailed, Policy
from memory_worker.usecases.vector_index import IndexSearch
from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable

DEFAULT_LIMIT = 5
OVERFETCH = 4
MOST_FETCHED = 60
MOST_AS_OF = 500


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked. `types` empty = all."""

    user_id: str
    text: str
    types: tuple[MemoryType, ...] = ()
    limit: int = DEFAULT_LIMIT
    token_budget: int = 0
    as_of: datetime | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was found, pinned first. `degraded`: by comparing with each of the user's own, because the vector database
    did not answer or lacked some."""

    items: list[Ranked]
    degraded: bool = False


class Retriever:
    """Asks for memories; honours what the user allows."""

    def __init__(
        self, memories: ItemStore, embedders: Embedders, search: IndexSearch, *, policy: Policy, clock: Clock
    ) -> None:
        self._memories = memories
        self._embedders = embedders
        self._search = search
        self._policy = policy
        self._clock = clock

    async def retrieve(self, query: Query) -> Retrieved:
        """Raises DependencyUnavailable. Nothing is better than what does not fit."""
        limit = query.limit or DEFAULT_LIMIT
        embedder = self._embedders.serving  # the same throughout, whatever serves meanwhile
        vector = await self._vector(query, embedder) if query.text.strip() else ()
        if query.as_of is not None:
            outlook = await self._as_of(query, query.as_of, vector, embedder)
        else:
            outlook = await self._now(query, vector, embedder, limit)
        now = query.as_of or self._clock.now()
        scores = {item.item_id: score for item, score in outlook.near}
        pinned = [
            Ranked(each.item, each.score, each.parts, pinned=True) for each in (
                rank(item, scores.get(item.item_id, 0.0), now=now) for item in outlook.constraints
            )
        ]
        pins = {each.item.item_id for each in pinned}
        ranked = [rank(item, score, now=now) for item, score in outlook.near if item.item_id not in pins]
        return Retrieved(
            choose(pinned, ranked, limit=limit, token_budget=query.token_budget),
            degraded=self._search.used and outlook.scanned and bool(vector) and query.as_of is None,
        )

    async def _now(self, query: Query, vector: Vector, embedder: Embedder, limit: int) -> Outlook:
        types, most = query.types or tuple(MemoryType), min(MOST_FETCHED, OVERFETCH * limit)
        looking: Looking | None = None
        if vector:
            looking = Looking(vector, embedder.name, await self._search.near(
                embedder.name, query.user_id, vector, types=types, most=most
            ))
        return await self._memories.look(
            query.user_id, looking, types=types, most=most, floor=self._floor(embedder),
            most_constraints=MOST_PINNED,
        )

    def _floor(self, embedder: Embedder) -> float:
        given = self._policy.retrieve_floor
        return embedder.floors.retrieve if given is None else given

    async def _as_of(self, query: Query, moment: datetime, vector: Vector, embedder: Embedder) -> Outlook:
        settings = await self._memories.settings(query.user_id)
        if not settings.memory_enabled:
            return Outlook(settings, (), ())
        types = query.types or tuple(MemoryType)
        then = [
            item for item in await self._memories.items_as_of(
                query.user_id, moment, kind=None, before=None, limit=MOST_AS_OF
            ) if item.type in types and item.sensitivity <= settings.most_sensitive
        ]
        near = await self._memories.similarities(
            query.user_id, vector, embedder.name, [item.item_id for item in then]
        ) if vector else {}
        found: list[tuple[Item, float]] = [
            (item, near[item.item_id]) for item in then if near.get(item.item_id, -1.0) >= self._floor(embedder)
        ]
        return Outlook(settings, tuple(found), tuple(item for item in then if item.type is MemoryType.CONSTRAINT))

    async def _vector(self, query: Query, embedder: Embedder) -> Vector:
        try:
            return (await embedder.embed(query.user_id, [query.text], request_id=query.request_id)).vectors[0]
        except ModelCallFailed as failure:
            raise DependencyUnavailable(f"the embedder ({failure.reason})") from failure
