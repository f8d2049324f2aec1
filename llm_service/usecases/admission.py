"""Places below limits: taken at once where there is one, else waited for in a short queue, first come first served."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llm_service.domain.errors import RateLimited
from llm_service.domain.rate_limit import Limits, LimitState
from llm_service.usecases.ports import Limiter, Place
from servicekit.core.clock import Clock

BUSY_SECONDS = 0.05
LONGEST_NAP_SECONDS = 0.25


@dataclass(slots=True)
class _Queue:
    """Who waits for one subject; the lock is given in the order of asking."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Admission:
    """Lets calls in. `queue_seconds`: nobody waits longer; `most_waiting`: nor behind more."""

    def __init__(self, limiter: Limiter, *, clock: Clock, queue_seconds: float, most_waiting: int) -> None:
        self._limiter = limiter
        self._clock = clock
        self._queue_seconds = queue_seconds
        self._most_waiting = most_waiting
        self._queues: dict[str, _Queue] = {}

    async def try_enter(self, subject: str, limits: Limits, *, tokens: int) -> Place | float:
        """A place, or after how many seconds it is worth asking again. Nobody passes those who wait."""
        if subject in self._queues:
            return BUSY_SECONDS
        return await self._limiter.enter(subject, limits, tokens=tokens)

    async def enter(
        self, subject: str, limits: Limits, *, tokens: int, deadline: float | None, what: str,
    ) -> Place:
        """A place, waited for where that helps. Raises RateLimited, with when to come back."""
        entered = await self.try_enter(subject, limits, tokens=tokens)
        if isinstance(entered, Place):
            return entered
        give_up_at = self._clock.monotonic() + self._queue_seconds
        if deadline is not None:
            give_up_at = min(give_up_at, deadline)
        queue = self._queues.setdefault(subject, _Queue())
        if queue.waiting >= self._most_waiting or self._clock.monotonic() + entered > give_up_at:
            self._forget(subject, queue)
            raise _limited(what, entered)
        queue.waiting += 1
        try:
            return await self._wait(queue, subject, limits, tokens, give_up_at, what)
        finally:
            queue.waiting -= 1
            self._forget(subject, queue)

    async def _wait(
        self, queue: _Queue, subject: str, limits: Limits, tokens: int, give_up_at: float, what: str
    ) -> Place:
        clock = self._clock.monotonic
        try:
            async with asyncio.timeout(max(0.0, give_up_at - clock())):
                await queue.lock.acquire()
        except TimeoutError:
            raise _limited(what, BUSY_SECONDS) from None
        try:
            while True:
                entered = await self._limiter.enter(subject, limits, tokens=tokens)
                if isinstance(entered, Place):
                    return entered
                if clock() + entered > give_up_at:
                    raise _limited(what, entered)
                await self._limiter.freed(subject, min(entered, LONGEST_NAP_SECONDS))
        finally:
            queue.lock.release()

    def _forget(self, subject: str, queue: _Queue) -> None:
        if not queue.waiting:
            self._queues.pop(subject, None)

    def leave(self, place: Place, *, used_tokens: int) -> None:
        self._limiter.leave(place, used_tokens=used_tokens)


def _limited(what: str, wait_seconds: float) -> RateLimited:
    return RateLimited(f"a limit of {what} is reached", retry_after_seconds=max(wait_seconds, 0.1))


class LocalLimiter:
    """Implements Limiter for one process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._states: dict[str, LimitState] = {}
        self._freed: dict[str, asyncio.Event] = {}

    async def enter(self, subject: str, limits: Limits, *, tokens: int) -> Place | float:
        state = self._states.get(subject)
        if state is None or state.limits != limits:
            running = state.running if state else 0
            state = self._states[subject] = LimitState(limits)
            state.running = running
        wait = state.try_take(tokens, self._clock.monotonic())
        return wait if wait > 0 else Place(subject, limits, "", tokens)

    def leave(self, place: Place, *, used_tokens: int) -> None:
        state = self._states.get(place.subject)
        if state is not None:
            state.leave(place.tokens - used_tokens)
        self.wake(place.subject)

    def wake(self, subject: str) -> None:
        """Those who wait for the subject look again."""
        if (event := self._freed.pop(subject, None)) is not None:
            event.set()

    async def keep(self, places: object) -> None:
        """Places of this process go with it."""

    async def freed(self, subject: str, seconds: float) -> None:
        event = self._freed.setdefault(subject, asyncio.Event())
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return
