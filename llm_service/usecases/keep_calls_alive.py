"""Heartbeats: running calls are written down, their leases and holds renewed, cancellations heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from llm_service.usecases.ports import CallJournal, CreditLedger, Heartbeat, Limiter
from llm_service.usecases.running_calls import RunningCalls
from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

BEAT_SECONDS = 0.5
YOUNGEST_SECONDS = 0.25
"""Calls that end sooner never get a started row: their hold is their durable start, and one write is enough."""


async def beat_once(
    running: RunningCalls, journal: CallJournal, ledger: CreditLedger, limiter: Limiter, *, clock: Clock,
    hold_ttl: timedelta,
) -> None:
    """Raises DependencyUnavailable; the next beat tries again."""
    now = clock.monotonic()
    old = [call for call in running.all() if now - call.started_seconds >= YOUNGEST_SECONDS and not call.is_ended]
    if not old:
        return
    if places := [place for call in old for place in call.places]:
        await limiter.keep(places)
    for call_id in await journal.beat([Heartbeat(call.checkpoint(), call.turn_so_far()) for call in old]):
        if (call := running.get(call_id)) is not None:
            call.cancel()
    soon = clock.now() + hold_ttl / 2
    expiring = [call for call in old if call.hold_expires_at < soon]
    if expiring:
        await ledger.extend_holds([(call.user_id, call.call_id) for call in expiring])
        for call in expiring:
            call.hold_expires_at = clock.now() + hold_ttl


async def keep_calls_alive(
    running: RunningCalls, journal: CallJournal, ledger: CreditLedger, limiter: Limiter, *, clock: Clock,
    hold_ttl: timedelta, beat: Callable[[], None] = lambda: None,
) -> None:
    """Runs until it is cancelled. `beat` is called with every beat, whatever becomes of it."""
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        beat()
        try:
            await beat_once(running, journal, ledger, limiter, clock=clock, hold_ttl=hold_ttl)
        except DomainError as error:
            log.warning("heartbeat_failed", reason=str(error))
