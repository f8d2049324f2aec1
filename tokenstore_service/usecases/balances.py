"""Balances as they are read and watched: from the database, or from a cache that can not go back in time (I12)."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Sequence

from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.account import Account
from tokenstore_service.usecases.ports import LedgerReader, SnapshotCache

log = EventLogger(__name__)

MIN_SEQ_WAIT_SECONDS = 5.0
MIN_SEQ_POLL_SECONDS = 0.02
MOST_KEPT = 100_000
PUBLISH_SECONDS = 0.02
MOST_PUBLISHED = 1_000
MOST_UNPUBLISHED = 100_000
WATCH_POLL_SECONDS = 0.1
MOST_WATCHED_AT_ONCE = 1_000


class Balances:
    """Reads of balances. Without a shared cache the last states seen here are kept for `keep_seconds`: what this
    process wrote is always there, what another one wrote is at most so old. `min_seq` reads one's own writes anywhere.
    """

    def __init__(
        self, reader: LedgerReader, *, clock: Clock, keep_seconds: float, shared: SnapshotCache | None = None
    ) -> None:
        self._reader = reader
        self._clock = clock
        self._keep_seconds = keep_seconds
        self._shared = shared
        self._kept: dict[str, tuple[Account, float]] = {}
        self._unpublished: dict[str, Account] = {}

    def committed(self, accounts: Sequence[Account]) -> None:
        """Told after each commit of this process."""
        if self._shared is not None:
            for account in accounts:
                self._unpublished[account.user_id] = account
            if len(self._unpublished) > MOST_UNPUBLISHED:  # the cache is away: its snapshots age out by themselves
                self._unpublished.clear()
            return
        until = self._clock.monotonic() + self._keep_seconds
        for account in accounts:
            if account.user_id in self._kept:
                self._kept[account.user_id] = (account, until)

    async def get(self, user_id: str, *, min_seq: int = 0) -> tuple[Account, str]:
        """The account and where it was read; an unknown one reads as zero. Waits for `min_seq`, at most 5 s, then
        answers what there is."""
        cached = await self._cached(user_id)
        if cached is not None and cached.seq >= min_seq:
            return cached, "cache"
        give_up_at = self._clock.monotonic() + MIN_SEQ_WAIT_SECONDS
        while True:
            account = (await self._reader.accounts([user_id])).get(user_id) or Account(user_id)
            if account.seq >= min_seq or self._clock.monotonic() >= give_up_at:
                self._keep(account)
                return account, "db"
            await asyncio.sleep(MIN_SEQ_POLL_SECONDS)

    async def get_many(self, user_ids: Sequence[str]) -> list[tuple[Account, str]]:
        """One for each, in order."""
        known = await self._reader.accounts(user_ids)
        return [(known.get(user_id) or Account(user_id), "db") for user_id in user_ids]

    async def _cached(self, user_id: str) -> Account | None:
        if self._shared is not None:
            return (await self._shared.get([user_id])).get(user_id)
        kept = self._kept.get(user_id)
        return kept[0] if kept is not None and kept[1] > self._clock.monotonic() else None

    def _keep(self, account: Account) -> None:
        if self._shared is not None:
            if account.version:
                self._unpublished.setdefault(account.user_id, account)
            return
        if not self._keep_seconds or not account.version:
            return
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        known = self._kept.get(account.user_id)
        if known is None or known[0].version <= account.version:
            self._kept[account.user_id] = (account, self._clock.monotonic() + self._keep_seconds)

    async def publish(self) -> None:
        """Moves the shared cache forward, the newest state of each account. Runs until it is cancelled."""
        assert self._shared is not None
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            while self._unpublished:
                users = list(self._unpublished)[:MOST_PUBLISHED]
                await self._shared.put([self._unpublished.pop(user) for user in users])


class Watcher:
    """One caller of WatchBalance: the newest state that it was not told yet."""

    def __init__(self) -> None:
        self.newest: Account | None = None
        self.changed = asyncio.Event()

    def offer(self, account: Account) -> None:
        if self.newest is None or account.version > self.newest.version:
            self.newest = account
            self.changed.set()


class BalanceFeed:
    """Tells watchers of changes: at once of those of this process, by one query for all watched accounts every 100 ms
    of those of other replicas."""

    def __init__(self, reader: LedgerReader) -> None:
        self._reader = reader
        self._watchers: dict[str, set[Watcher]] = {}
        self._closed = False

    def committed(self, accounts: Sequence[Account]) -> None:
        """Told after each commit of this process."""
        if self._watchers:
            for account in accounts:
                for watcher in self._watchers.get(account.user_id, ()):
                    watcher.offer(account)

    def close(self) -> None:
        """Ends every watch: the server drains."""
        self._closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    async def watch(self, user_id: str, *, from_seq: int) -> AsyncIterator[Account]:
        """States of the account, newer ones only, until the server drains. With `from_seq` nothing before the account
        has an entry after it."""
        watcher = Watcher()
        self._watchers.setdefault(user_id, set()).add(watcher)
        try:
            first = (await self._reader.accounts([user_id])).get(user_id) or Account(user_id)
            if watcher.newest is None or first.version >= watcher.newest.version:
                watcher.newest = first
                watcher.changed.set()
            while not self._closed:
                await watcher.changed.wait()
                watcher.changed.clear()
                account = watcher.newest
                if account is not None and not self._closed and (account.seq > from_seq or from_seq == 0):
                    from_seq = 0
                    yield copy.copy(account)
        finally:
            left = self._watchers[user_id]
            left.discard(watcher)
            if not left:
                del self._watchers[user_id]

    async def follow(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(WATCH_POLL_SECONDS)
            users = list(self._watchers)
            try:
                for begin in range(0, len(users), MOST_WATCHED_AT_ONCE):
                    part = users[begin:begin + MOST_WATCHED_AT_ONCE]
                    self.committed(list((await self._reader.accounts(part)).values()))
            except DomainError:
                log.warning("balances_not_followed")
