"""Which embedder serves, and the change to another: both make vectors until every item has the new one's, then it
serves, for all replicas at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from memory_worker.usecases.memory_ports import Embedder, Upkeep, Vector, Vectors
from memory_worker.usecases.ports import ModelCallFailed
from servicekit.core.errors import DependencyUnavailable, DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

FOLLOW_SECONDS = 1.0
SETTLED = timedelta(seconds=3)
"""Every replica that follows knows of a new embedder by then, and makes its vectors."""
RETIRED_AFTER = timedelta(seconds=30)
"""Every replica that follows compares the new one's by then."""
MOST_AT_ONCE = 500


class Embedders:
    """The embedder that serves, and one that may be filled in beside it. `make` builds one by its name, or answers
    None when this process cannot."""

    def __init__(self, wanted: Embedder, upkeep: Upkeep, *, make: Callable[[str], Embedder | None]) -> None:
        self._wanted = wanted
        self._upkeep = upkeep
        self._make = make
        self._known: dict[str, Embedder | None] = {wanted.name: wanted}
        self._names = ("", "")

    async def announce(self) -> None:
        """Tells which one this process wants: the newest start decides. Raises DependencyUnavailable."""
        await self._upkeep.announce(self._wanted.name)
        await self.refresh()

    async def refresh(self) -> None:
        """Raises DependencyUnavailable."""
        names = await self._upkeep.embedders()
        if names != self._names:
            log.info("embedders", serving=names[0], filling=names[1])
        for name in filter(None, names):
            if name not in self._known:
                self._known[name] = self._make(name)
        self._names = names

    async def follow(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.refresh()
            except DomainError as error:
                log.warning("embedders_unknown", reason=str(error))

    @property
    def serving(self) -> Embedder:
        """Raises DependencyUnavailable."""
        found = self._known.get(self._names[0])
        if found is None:
            raise DependencyUnavailable(f"the embedder {self._names[0] or '(unknown)'}, which this process cannot make")
        return found

    @property
    def filling(self) -> Embedder | None:
        return self._known.get(self._names[1]) if self._names[1] else None

    @property
    def names(self) -> tuple[str, str]:
        """Of the one that serves, and of the one that is filled in or ""."""
        return self._names

    @property
    def can_fill(self) -> bool:
        """This process can make all vectors that are wanted."""
        return all(self._known.get(name) is not None for name in filter(None, self._names))

    async def vectors(
        self, user_id: str, text: str, key: Callable[[str], str], *, known: Vectors | None = None
    ) -> dict[str, Vector]:
        """By the one that serves now and the one that is filled in; `key` makes the request_id of an embedder's name,
        `known` has what was made already. Where the one that is filled in fails, the filling makes up for it later.
        Raises ModelCallFailed, DependencyUnavailable."""
        serving, filling = self.serving, self.filling
        made = {name: vector for name, vector in (known or {}).items() if name == serving.name}
        if not made:
            made[serving.name] = (await serving.embed(user_id, [text], request_id=key(serving.name))).vectors[0]
        if filling is not None:
            try:
                found = await filling.embed(user_id, [text], request_id=key(filling.name), skip_charge=True)
                made[filling.name] = found.vectors[0]
            except ModelCallFailed as failure:
                log.warning("vector_put_off", embedder=filling.name, reason=failure.reason)
        return made

    async def fill(self) -> int:
        """Makes the vectors that are lacking, uncharged; when none is, the new one serves. Answers how many."""
        done = 0
        for embedder in filter(None, (self._known.get(self._names[0]), self.filling)):
            try:
                done += await self._fill(embedder)
            except ModelCallFailed as failure:
                log.warning("filling_put_off", embedder=embedder.name, reason=failure.reason)
        filling = self.filling
        if filling is not None and await self._upkeep.switch(filling.name, settled=SETTLED):
            log.info("embedder_switched", serving=filling.name)
            await self.refresh()
        if done:
            log.info("vectors_made", items=done)
        return done

    async def _fill(self, embedder: Embedder) -> int:
        done = 0
        while found := await self._upkeep.unindexed(embedder.name, limit=MOST_AT_ONCE):
            for item in found:
                made = await embedder.embed(
                    item.user_id, [item.content], skip_charge=True,
                    request_id=f"memory:index:{item.item_id}:{item.version}:{embedder.name}"[:128],
                )
                await self._upkeep.set_vector(item, embedder.name, made.vectors[0])
            done += len(found)
        return done
