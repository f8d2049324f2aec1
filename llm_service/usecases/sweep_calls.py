"""The sweeper: calls whose process died are settled by their last checkpoint, or become a visible unknown outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from llm_service.domain.call import CallState, sweep
from llm_service.usecases.ports import AbandonedTurns, CallJournal, CreditLedger, Settlement
from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

SWEEP_SECONDS = 1.0
MOST_AT_ONCE = 100
OVERLAP = timedelta(minutes=5)
"""Expired holds are asked for again for so long: clocks differ, and commits come late."""
ORPHANS_EVERY = 3
PRUNE_EVERY = 60
Found = Callable[[str, int], None]


def _tell_nobody(_state: str, _calls: int) -> None: ...


async def sweep_abandoned(
    journal: CallJournal, turns: AbandonedTurns, *, clock: Clock, found: Found = _tell_nobody
) -> int:
    """Calls with a record whose lease ran out. Returns how many."""
    abandoned = await journal.claim_abandoned(limit=MOST_AT_ONCE)
    for record in abandoned:
        swept = sweep(record, at=clock.now())
        end = await turns.abandoned_turn(record) if record.billing.conversation_id else None
        recorded = await journal.settle(Settlement(swept, turn_end=end))
        log.warning("call_swept", call_id=str(record.call_id), state=recorded.state.name)
        found(recorded.state.name, 1)
    return len(abandoned)


async def sweep_orphaned_holds(
    journal: CallJournal, ledger: CreditLedger, *, clock: Clock, found: Found = _tell_nobody
) -> int:
    """Calls that died before anything but their hold was written. Returns how many were found."""
    cursor = await journal.sweep_cursor() or clock.now() - timedelta(days=1)
    holds = await ledger.expired_holds(since=cursor - OVERLAP)
    added = await journal.add_unknown_outcomes(holds) if holds else 0
    if holds and holds[-1].closed_at > cursor:
        await journal.move_sweep_cursor(holds[-1].closed_at)
    if added:
        log.warning("unknown_outcomes", calls=added)
        found(CallState.UNKNOWN_OUTCOME.name, added)
    return added


async def sweep_calls(
    journal: CallJournal, ledger: CreditLedger, turns: AbandonedTurns, *, clock: Clock, answers_kept: timedelta,
    found: Found = _tell_nobody,
) -> None:
    """Runs until it is cancelled. `found` is told of states and how many calls."""
    rounds = 0
    while True:
        try:
            while await sweep_abandoned(journal, turns, clock=clock, found=found) == MOST_AT_ONCE:
                pass
            if rounds % ORPHANS_EVERY == 0:
                await sweep_orphaned_holds(journal, ledger, clock=clock, found=found)
            if rounds % PRUNE_EVERY == 0:
                await journal.prune_answers(before=clock.now() - answers_kept)
        except DomainError as error:
            log.warning("sweep_failed", reason=str(error))
        rounds += 1
        await asyncio.sleep(SWEEP_SECONDS)
