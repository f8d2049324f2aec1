"""Closes holds whose time has run out; several replicas may sweep at once, each hold is closed once (I2)."""

from __future__ import annotations

import asyncio

from servicekit.core.clock import Clock
from tokenstore_service.domain.commands import ExpireHold
from tokenstore_service.usecases.ports import LedgerReader
from tokenstore_service.usecases.write_books import BookWriter

SWEEP_SECONDS = 1.0
MOST_AT_ONCE = 500


async def sweep_holds_once(reader: LedgerReader, writer: BookWriter, *, clock: Clock) -> int:
    """Returns how many were found."""
    found = await reader.holds_to_expire(now=clock.now(), limit=MOST_AT_ONCE)
    if found:
        await writer.apply_all([ExpireHold(user_id, hold_id) for user_id, hold_id in found])
    return len(found)


async def sweep_holds(reader: LedgerReader, writer: BookWriter, *, clock: Clock) -> None:
    """Runs until it is cancelled."""
    while True:
        if await sweep_holds_once(reader, writer, clock=clock) < MOST_AT_ONCE:
            await asyncio.sleep(SWEEP_SECONDS)
