"""What is worth knowing for a query."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from memory_worker.domain.item import Item, ItemStatus, MemoryType
from memory_worker.domain.ranking import MOST_PINNED, Ranked, choose, rank
from memory_worker.usecases.ports import Embedder, MemoryStore, ModelCallFailed, Policy, Vector
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


class Retriever:
    """Asks for memories; honours what the user allows."""

    def __init__(self, memories: MemoryStore, embedder: Embedder, *, policy: Policy, clock: Clock) -> None:
        self._memories = memories
        self._embedder = embedder
        self._policy = policy
        self._clock = clock

    async def retrieve(self, query: Query) -> list[Ranked]:
        """Raises DependencyUnavailable. Nothing is better than what does not fit."""
        settings = await self._memories.settings(query.user_id)
        if not settings.memory_enabled:
            return []
        types = query.types or tuple(MemoryType)
        now = query.as_of or self._clock.now()
        vector = await self._vector(query) if query.text.strip() else ()
        if query.as_of is not None:
            then = await self._memories.items_as_of(
                query.user_id, query.as_of, kind=None, before=None, limit=MOST_AS_OF
            )
            near = await self._memories.similarities(
                query.user_id, vector, self._embedder.name, [item.item_id for item in then]
            ) if vector else {}
            found = [
                (item, near[item.item_id]) for item in then
                if near.get(item.item_id, -1.0) >= self._policy.retrieve_floor
            ]
            constraints = [item for item in then if item.type is MemoryType.CONSTRAINT]
        else:
            found = await self._memories.similar(
                query.user_id, vector, self._embedder.name, types=types, floor=self._policy.retrieve_floor,
                most=min(MOST_FETCHED, OVERFETCH * (query.limit or DEFAULT_LIMIT)),
            ) if vector else []
            constraints = await self._memories.constraints(query.user_id, most=MOST_PINNED)
        allowed = [0, 1, 2] if settings.sensitive_enabled else [0]

        def may(item: Item) -> bool:
            return item.sensitivity in allowed and item.type in types and item.status is ItemStatus.ACTIVE

        scores = {item.item_id: score for item, score in found}
        pinned = [
            Ranked(each.item, each.score, each.parts, pinned=True) for each in (
                rank(item, scores.get(item.item_id, 0.0), now=now) for item in constraints if may(item)
            )
        ]
        pins = {each.item.item_id for each in pinned}
        ranked = [rank(item, score, now=now) for item, score in found if may(item) and item.item_id not in pins]
        return choose(pinned, ranked, limit=query.limit or DEFAULT_LIMIT, token_budget=query.token_budget)

    async def _vector(self, query: Query) -> Vector:
        try:
            return (await self._embedder.embed(query.user_id, [query.text], request_id=query.request_id))[0]
        except ModelCallFailed as failure:
            raise DependencyUnavailable(f"the embedder ({failure.reason})") from failure
