"""What is done now and then: items that expired, what has ended and is no longer kept, vectors that are lacking, the
vector database beside the items. One replica does it at a time; another takes over when it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from memory_worker.usecases.embedding import RETIRED_AFTER, Embedders
from memory_worker.usecases.memory_ports import IndexAway, IndexStatus, Retention, Upkeep
from memory_worker.usecases.vector_index import Drift, IndexKeeper
from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

LEASE_SECONDS = 60.0
CHORES = "housekeeping"
FILLING = "embedding"
MOST_AT_ONCE = 500


class Leases(Protocol):
    """Which replica does the chores."""

    async def claim(self, name: str, *, seconds: float) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often chores are done, and items are compared with their vectors and with the vector database."""

    chores_seconds: float
    compare: timedelta


class Housekeeper:
    """Does the chores. `expired`, `indexed`, `drifted` and `waiting` are told of them."""

    def __init__(
        self, upkeep: Upkeep, embedders: Embedders, leases: Leases, *, kept: Retention, rhythm: Rhythm, clock: Clock,
        index: IndexKeeper | None = None, expired: Callable[[int], None] = lambda _: None,
        indexed: Callable[[IndexStatus], None] = lambda _: None, drifted: Callable[[Drift], None] = lambda _: None,
        waiting: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._upkeep = upkeep
        self._embedders = embedders
        self._leases = leases
        self._kept = kept
        self._rhythm = rhythm
        self._clock = clock
        self._index = index
        self._expired = expired
        self._indexed = indexed
        self._drifted = drifted
        self._waiting = waiting
        self._filled, self._filled_at = ("", ""), clock.now()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            try:
                if await self._leases.claim(CHORES, seconds=LEASE_SECONDS) is not None:
                    await self.do_all()
                # Apart from the rest: not every replica may be able to make a new embedder's vectors.
                if self._embedders.can_fill and await self._leases.claim(FILLING, seconds=LEASE_SECONDS) is not None:
                    await self._fill()
            except (DomainError, IndexAway) as error:
                log.warning("housekeeping_failed", reason=str(error))
            await asyncio.sleep(self._rhythm.chores_seconds)

    async def _fill(self) -> None:
        """At once while an embedder is new, else now and then: it looks at every item."""
        now, names = self._clock.now(), self._embedders.names
        if names == self._filled and not self._embedders.filling and now - self._filled_at < self._rhythm.compare:
            return
        await self._embedders.fill()
        self._indexed(await self._upkeep.index_status(self._embedders.serving.name))
        self._filled, self._filled_at = names, now

    async def do_all(self) -> None:
        """Once. Raises DependencyUnavailable, IndexAway."""
        while (count := await self._upkeep.expire(limit=MOST_AT_ONCE)) > 0:
            self._expired(count)
            if count < MOST_AT_ONCE:
                break
        while max((await self._upkeep.prune(self._kept, limit=MOST_AT_ONCE)).values(), default=0) >= MOST_AT_ONCE:
            await self._leases.claim(CHORES, seconds=LEASE_SECONDS)
        for name in await self._upkeep.remove_retired(after=RETIRED_AFTER, limit=MOST_AT_ONCE * 20):
            if self._index is not None:
                await self._index.drop(name)
        if self._index is not None:
            self._waiting(await self._index.waiting())
            drift = await self._index.compare_when_due(self._rhythm.compare)
            if drift is not None:
                self._drifted(drift)
