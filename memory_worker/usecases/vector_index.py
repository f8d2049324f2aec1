"""A vector database beside PostgreSQL: asked for proposals, told of every change, compared now and then, never trusted,
and never waited for when it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from memory_worker.domain.item import MemoryType
from memory_worker.usecases.memory_ports import IndexAway, IndexOutbox, Vector, VectorIndex
from servicekit.core.backoff import Backoff
from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

SPARE = 10
"""Proposals beyond what is wanted, for those that are no longer alive."""
REST_SECONDS = 5.0
POLL_SECONDS = 0.3
LEASE = timedelta(seconds=60)
MOST_AT_ONCE = 200
PAGE = 1000


class IndexSearch:
    """Proposals for a search. After a failure the index rests for REST_SECONDS; then one search at a time tries it."""

    def __init__(
        self, index: VectorIndex | None, *, clock: Clock, failed: Callable[[], None] = lambda: None
    ) -> None:
        self._index = index
        self._clock = clock
        self._failed = failed
        self._rests_until = 0.0
        self._probing = False

    @property
    def used(self) -> bool:
        return self._index is not None

    async def near(
        self, embedder: str, user_id: str, vector: Vector, *, types: Sequence[MemoryType], most: int
    ) -> list[UUID] | None:
        """None = no answer: compare with each of the user's own."""
        if self._index is None or self._clock.monotonic() < self._rests_until or self._probing:
            return None
        self._probing = self._rests_until > 0
        try:
            found = await self._index.search(embedder, user_id, vector, types=types, most=most + SPARE)
        except IndexAway as away:
            self._rests_until = self._clock.monotonic() + REST_SECONDS
            self._failed()
            log.warning("index_away", reason=str(away))
            return None
        finally:
            self._probing = False
        self._rests_until = 0.0
        return found


@dataclass(frozen=True, slots=True)
class Drift:
    """What a comparison found: active items that the index lacks, those it has otherwise, and what it should not have.
    All of it is mended."""

    embedder: str
    missing: int
    stale: int
    orphaned: int
    at: datetime


class IndexKeeper:
    """Tells the index of changes, and compares it with the items."""

    def __init__(
        self, index: VectorIndex, outbox: IndexOutbox, *, serving: Callable[[], str], clock: Clock
    ) -> None:
        self._index = index
        self._outbox = outbox
        self._serving = serving
        self._clock = clock
        self.drift: Drift | None = None

    async def run(self) -> None:
        """Delivers until it is cancelled."""
        backoff = Backoff(first_seconds=0.5, most_seconds=30.0)
        while True:
            try:
                delivered = await self.deliver()
                backoff.reset()
                if delivered < MOST_AT_ONCE:
                    await asyncio.sleep(POLL_SECONDS)
            except (IndexAway, DomainError) as error:
                seconds = backoff.next_seconds()
                log.warning("index_behind", reason=str(error), next_try_seconds=round(seconds, 2))
                await asyncio.sleep(seconds)

    async def deliver(self) -> int:
        """Raises IndexAway, DependencyUnavailable; what was claimed is due again after its lease."""
        serving = self._serving()
        changes = await self._outbox.claim(serving, limit=MOST_AT_ONCE, lease=LEASE)
        if not changes:
            return 0
        try:
            entries = [each.entry for each in changes if each.entry is not None]
            if entries:
                await self._index.put(serving, entries)
            gone = [each.item_id for each in changes if each.entry is None]
            if gone:
                await self._index.remove(serving, gone)
        except IndexAway:
            await self._outbox.mark([(each.user_id, each.item_id) for each in changes])
            raise
        await self._outbox.done(changes)
        return len(changes)

    async def forget(self, user_id: str) -> bool:
        """Everything of an erased user, now; False when the index is away, and is told later."""
        try:
            await self._index.forget(self._serving(), user_id)
        except IndexAway as away:
            log.warning("index_away", reason=str(away))
            return False
        await self._outbox.forget(user_id)
        return True

    async def compare(self) -> Drift:
        """Both ways. Raises IndexAway, DependencyUnavailable."""
        serving = self._serving()
        missing = stale = orphaned = 0
        after: tuple[str, UUID] | None = None
        while rows := await self._outbox.live(serving, after=after, limit=PAGE):
            has = await self._index.versions(serving, [item_id for _, item_id, _ in rows])
            wrong = [(user_id, item_id) for user_id, item_id, version in rows if has.get(item_id) != version]
            missing += sum(item_id not in has for _, item_id in wrong)
            stale += sum(item_id in has for _, item_id in wrong)
            if wrong:
                await self._outbox.mark(wrong)
            after = rows[-1][:2]
        async for page in self._index.everything(serving):
            known = await self._outbox.versions(serving, list(page))
            gone = [item_id for item_id in page if item_id not in known]
            orphaned += len(gone)
            if gone:
                await self._index.remove(serving, gone)
        self.drift = Drift(serving, missing, stale, orphaned, self._clock.now())
        if missing or stale or orphaned:
            log.warning("index_drift", missing=missing, stale=stale, orphaned=orphaned)
        return self.drift

    async def compare_when_due(self, every: timedelta) -> Drift | None:
        """At once when another embedder serves than the last time. Raises IndexAway, DependencyUnavailable."""
        last = self.drift
        if last is not None and last.embedder == self._serving() and self._clock.now() - last.at < every:
            return None
        return await self.compare()

    async def waiting(self) -> int:
        """How many changes it is still to be told of. Raises DependencyUnavailable."""
        return await self._outbox.waiting()

    async def drop(self, embedder: str) -> None:
        """Raises IndexAway."""
        await self._index.drop(embedder)
