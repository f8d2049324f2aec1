"""The relay: takes committed messages to the receiver, in order per key, at least once, for as long as it takes.

Several replicas share the work by lanes (see message.LANES). A row is deleted only after the receiver confirmed it, so
a crash anywhere leads to a second delivery, which receivers absorb by (key, event_id), and never to a lost one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta

from servicekit.core.backoff import Backoff
from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError
from servicekit.core.faults import FaultPoint, Faults, NoFaults
from servicekit.db.database import Database
from servicekit.outbox import table
from servicekit.outbox.message import LANES, OutboxMessage, Publisher
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import OutboxMetrics

log = EventLogger(__name__)

LEASE = timedelta(seconds=5)
RENEW_SECONDS = 1.5
POLL_SECONDS = 0.1
LINGER_SECONDS = 0.02
"""Between a commit and its delivery. Nobody waits for it: the hold keeps the credit. It makes fuller batches, and the
hold of a client's next call no longer waits for the commit that delivers the last one."""
MOST_MESSAGES = 500
KEY_BACKOFF_SECONDS = 1.0
MOST_BLOCKED_KEYS = 10_000


class OutboxRelay:
    """One replica's share of the outbox."""

    def __init__(
        self, database: Database, publisher: Publisher, *, owner: str, metrics: OutboxMetrics, clock: Clock,
        faults: Faults | None = None,
    ) -> None:
        self._database = database
        self._publisher = publisher
        self._owner = owner
        self._metrics = metrics
        self._clock = clock
        self._faults = faults or NoFaults()
        self._lanes: list[int] = []
        self._leased_until = 0.0
        self._blocked: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._backoff = Backoff(first_seconds=0.05, most_seconds=5.0)
        self._stopping = False
        self._stopped = asyncio.Event()
        self._stopped.set()

    def wake(self) -> None:
        """Something was committed: look now instead of at the next poll."""
        self._wake.set()

    async def run(self) -> None:
        """Relays until it is cancelled or told to leave."""
        self._stopped.clear()
        leasing = asyncio.create_task(self._keep_leases(), name="outbox-leases")
        try:
            while not self._stopping:
                await self._pause(POLL_SECONDS)
                await asyncio.sleep(LINGER_SECONDS)
                self._wake.clear()
                while await self._relay_once() == MOST_MESSAGES:
                    pass
        finally:
            self._stopped.set()
            leasing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leasing

    async def leave(self, *, flush_seconds: float) -> None:
        """Relays what still waits in this replica's lanes, at most so long, and gives the lanes to the others."""
        self._stopping = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(flush_seconds):
                await self._stopped.wait()
                while await self._relay_once():
                    pass
        with contextlib.suppress(DomainError):
            async with self._database.connection() as connection:
                await connection.execute(table.RELEASE_LANES, {"owner": self._owner, "keep": []})
                await connection.execute(table.FORGET_RELAYS, {"leaving": self._owner})
        self._lanes = []

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _keep_leases(self) -> None:
        while True:
            try:
                await self.claim()
            except DomainError:
                log.warning("outbox_lease_failed")
            except Exception as error:  # noqa: BLE001 - logged; the lease is tried again
                log.error("outbox_lease_failed", error=error)
            await asyncio.sleep(RENEW_SECONDS)

    async def claim(self) -> None:
        """Renews this replica's leases and takes its fair share of free lanes."""
        asked_at = self._clock.monotonic()
        lease = {"owner": self._owner, "lease": LEASE}
        async with self._database.connection() as connection:
            await connection.execute(table.ANNOUNCE, lease)
            row = await (await connection.execute(table.COUNT_RELAYS)).fetchone()
            share = -(-LANES // max(1, row[0] if row else 1))
            rows = await (await connection.execute(table.CLAIM_LANES, {**lease, "most": share})).fetchall()
            self._lanes = sorted(lane for (lane,) in rows)
            self._leased_until = asked_at + LEASE.total_seconds()
            await connection.execute(table.RELEASE_LANES, {"owner": self._owner, "keep": self._lanes})
            await connection.execute(table.FORGET_RELAYS, {"leaving": ""})

    async def _relay_once(self) -> int:
        """Relays one batch. Returns how many rows were read; 0 after a failure, once its back-off has passed."""
        if not self._lanes or self._clock.monotonic() > self._leased_until:
            return 0
        try:
            messages = await self._read()
            if not messages:
                self._metrics.waiting.set(0)
                self._metrics.age.set(0)
                return 0
            self._metrics.waiting.set(len(messages))
            self._metrics.age.set((self._clock.now() - messages[0].created_at).total_seconds())
            self._faults.reach(FaultPoint.BEFORE_PUBLISH)
            outcomes = await self._publisher.publish(messages)
            self._faults.reach(FaultPoint.AFTER_PUBLISH)
            await self._finish(messages, outcomes)
        except Exception as error:  # noqa: BLE001 - whatever it is, the rows stay and are tried again
            self._metrics.failed.inc()
            seconds = self._backoff.next_seconds()
            expected = isinstance(error, DomainError)
            log.error(
                "outbox_publish_failed", error=None if expected else error, reason=str(error),
                next_try_seconds=round(seconds, 2),
            )
            await asyncio.sleep(seconds)
            return 0
        self._backoff.reset()
        return len(messages)

    async def _read(self) -> list[OutboxMessage]:
        now = self._clock.monotonic()
        self._blocked = {key: until for key, until in self._blocked.items() if until > now}
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                table.READ_MESSAGES,
                {"lanes": self._lanes, "blocked": list(self._blocked), "most": MOST_MESSAGES}, binary=True,
            )
            return [OutboxMessage(*row) for row in await cursor.fetchall()]

    async def _finish(self, messages: Sequence[OutboxMessage], outcomes: Sequence[Exception | None]) -> None:
        """Deletes what was confirmed; a key that failed rests, and so do its later messages."""
        done: list[int] = []
        failed_keys: set[str] = set()
        for message, outcome in zip(messages, outcomes, strict=True):
            if outcome is None and message.key not in failed_keys:
                done.append(message.message_id)
            elif outcome is not None:
                failed_keys.add(message.key)
                log.warning("outbox_message_failed", event_id=message.event_id, reason=str(outcome))
        rest_until = self._clock.monotonic() + KEY_BACKOFF_SECONDS
        for key in failed_keys:
            if len(self._blocked) < MOST_BLOCKED_KEYS:
                self._blocked[key] = rest_until
        self._metrics.failed.inc(len(failed_keys))
        if done:
            async with self._database.connection() as connection:
                await connection.execute(table.DELETE_MESSAGES, {"ids": done})
            self._metrics.published.inc(len(done))
