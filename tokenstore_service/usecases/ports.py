"""What the use cases need from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from servicekit.core.offsets import OffsetMove
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, BookKeys
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.price_rule import PriceBook, PriceRule, PriceRuleStatus


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a batch touches, as it is while the accounts are locked."""

    accounts: Sequence[Account]
    holds: Sequence[Hold]
    entries: Sequence[Entry]


class BookUnit(Protocol):
    """One transaction on the books; leaving it without commit() rolls back."""

    async def load(self, keys: BookKeys) -> Loaded:
        """Locks the accounts until the end of the transaction, in the order of user_id, then reads."""
        ...

    async def save(self, book: Book, moves: Sequence[OffsetMove]) -> None:
        """Writes what changed and moves consumer offsets. Raises StaleConsumer."""
        ...

    async def commit(self) -> None: ...


class TransientFailure(Exception):
    """The transaction may be tried again: a deadlock, a lost connection, even at the commit."""


class BookStore(Protocol):
    """Opens units. Raises TransientFailure wherever trying again can help."""

    def begin(self) -> AbstractAsyncContextManager[BookUnit]: ...


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Which entries of an account; None = any. Times are of occurrence, `until` is exclusive."""

    user_id: str
    source: int | None = None
    is_expense: bool | None = None
    since: datetime | None = None
    until: datetime | None = None


class LedgerReader(Protocol):
    """Reads of the books; each is one consistent statement."""

    async def accounts(self, user_ids: Sequence[str]) -> dict[str, Account]: ...

    async def entries(self, wanted: EntryFilter, *, before_seq: int | None, limit: int) -> list[Entry]: ...

    async def entry_by_seq(self, user_id: str, seq: int) -> Entry | None: ...

    async def entry_by_event(self, user_id: str, event_id: str) -> Entry | None: ...

    async def hold(self, user_id: str, hold_id: UUID) -> Hold | None: ...

    async def holds_of_user(
        self, user_id: str, *, state: HoldState, before: tuple[datetime, UUID] | None, limit: int
    ) -> list[Hold]: ...

    async def expired_holds(
        self, *, origin: str, since: datetime, after: tuple[datetime, UUID] | None, limit: int
    ) -> list[Hold]: ...

    async def holds_to_expire(self, *, now: datetime, limit: int) -> list[tuple[str, UUID]]: ...

    def audit(self, user_ids: Sequence[str] | None) -> AsyncIterator[AuditPart]:
        """All accounts (or those given) by user_id, each followed by its entries by seq; consistent per account."""
        ...


@dataclass(frozen=True, slots=True)
class AccountPart:
    """The next account of an audit, with the sum of its open holds. `account` is None when only entries exist."""

    user_id: str
    account: Account | None
    held_micros: int


AuditPart = AccountPart | Entry


class PriceRules(Protocol):
    """Price rules in the database."""

    async def add(self, rule: PriceRule, *, idempotency_key: str) -> PriceRule:
        """Stores a version. Raises IdempotencyConflict, or VersionTaken when that version exists."""
        ...

    async def by_key(self, idempotency_key: str) -> PriceRule | None: ...

    async def newest(self, rule_id: str) -> PriceRule | None: ...

    async def version(self, rule_id: str, version: int) -> PriceRule | None: ...

    async def newest_of_all(
        self, *, scene: str, provider: str, model: str, status: PriceRuleStatus | None,
        after: tuple[datetime, str] | None, limit: int,
    ) -> list[tuple[datetime, PriceRule]]:
        """Newest versions by the time their first version was made."""
        ...


class VersionTaken(Exception):
    """Somebody else made this version first."""


class Prices(Protocol):
    """The price book that the hot path uses: in memory, at most 2 s old."""

    @property
    def book(self) -> PriceBook: ...

    async def ensure(self, versions: Iterable[tuple[str, int]]) -> None:
        """Loads again when one of the versions is not known."""
        ...

    async def refresh(self) -> None: ...
