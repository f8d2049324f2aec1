"""What time ends: holds, lots, unpaid orders. Each end is booked once, whoever sweeps; leases keep replicas from doing
the same work twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from servicekit.core.clock import Clock
from tokenstore_service.domain.commands import CloseOrder, ExpireHold, ExpireLots
from tokenstore_service.usecases.ports import Lease, LedgerReader, OrderReader
from tokenstore_service.usecases.write_books import BookWriter

SWEEP_SECONDS = 1.0
LEASE_SECONDS = 10.0
MOST_AT_ONCE = 500
ACTOR = "tokenstore_service"


async def expire_holds_once(reader: LedgerReader, writer: BookWriter, *, clock: Clock) -> int:
    """Returns how many were found."""
    found = await reader.holds_to_expire(now=clock.now(), limit=MOST_AT_ONCE)
    if found:
        await writer.apply_all([ExpireHold(user_id, hold_id) for user_id, hold_id in found])
    return len(found)


async def expire_lots_once(reader: LedgerReader, writer: BookWriter, *, clock: Clock) -> int:
    """All accounts with credit whose time is over; what running calls hold stays until they end. Returns how many."""
    total = 0
    after: tuple[datetime, str] | None = None
    while True:
        found = await reader.accounts_to_expire(now=clock.now(), after=after, limit=MOST_AT_ONCE)
        if found:
            await writer.apply_all([ExpireLots(user_id) for _, user_id in found])
        total += len(found)
        if len(found) < MOST_AT_ONCE:
            return total
        after = found[-1]


async def close_orders_once(
    orders: OrderReader, writer: BookWriter, *, clock: Clock, expiry_seconds: float
) -> int:
    """Pending orders that waited too long for their payment. Returns how many."""
    before = clock.now() - timedelta(seconds=expiry_seconds)
    found = await orders.pending_orders(created_before=before, limit=MOST_AT_ONCE)
    if found:
        await writer.apply_all([
            CloseOrder(order.user_id, order.order_id, ACTOR, "not paid in time") for order in found
        ])
    return len(found)


async def sweep(name: str, once: Callable[[], Awaitable[int]], leases: Lease) -> None:
    """Runs until it is cancelled; only while this replica has the lease of that name."""
    while True:
        found = 0
        if await leases.claim(f"sweep-{name}", seconds=LEASE_SECONDS) is not None:
            found = await once()
        if found < MOST_AT_ONCE:
            await asyncio.sleep(SWEEP_SECONDS)
