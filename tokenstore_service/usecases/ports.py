"""What the use cases need from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Protocol
from uuid import UUID

from servicekit.core.offsets import OffsetMove
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, BookKeys, Loaded, Wanted
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.commands import IssueKind
from tokenstore_service.domain.consumption import Consumption, ConsumptionKey
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.lot import Lot
from tokenstore_service.domain.order import Order, OrderStatus, OrderStep, Product, ProductStatus
from tokenstore_service.domain.price_rule import PriceBook, PriceRule, PriceRuleStatus
from tokenstore_service.domain.reward import RewardRule


class BookUnit(Protocol):
    """One transaction on the books; leaving it without commit() rolls back."""

    async def load(self, keys: BookKeys) -> Loaded:
        """Locks the accounts until the end of the transaction, in the order of user_id, then reads."""
        ...

    async def load_more(self, loaded: Loaded, wanted: Wanted) -> Loaded:
        """What the accounts ask for; the answer takes the place of `loaded`."""
        ...

    async def send(self, book: Book) -> None:
        """Begins to write the entries made so far, of a batch that is large enough: the database takes them in while
        the next ones are made. May be called again and again before save."""
        ...

    async def save(self, book: Book, moves: Sequence[OffsetMove]) -> None:
        """Writes what changed and moves consumer offsets. Raises StaleConsumer."""
        ...

    async def commit(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EncodedIssue:
    """The original of an issue as bytes, and what they are."""

    original: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Announcement:
    """A message that tells of a changed balance."""

    event_id: str
    event_type: str
    topic: str
    payload: bytes


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
    scene: str = ""
    model: str = ""
    conversation_id: str = ""
    order_id: str = ""


class LedgerReader(Protocol):
    """Reads of the books; each is one consistent statement."""

    async def accounts(self, user_ids: Sequence[str]) -> dict[str, Account]: ...

    async def entries(self, wanted: EntryFilter, *, before_seq: int | None, limit: int) -> list[Entry]: ...

    async def entry_by_seq(self, user_id: str, seq: int) -> Entry | None: ...

    async def entry_by_event(self, user_id: str, event_id: str) -> Entry | None: ...

    async def entry_at(self, user_id: str, at: datetime) -> Entry | None:
        """The newest entry booked at or before a moment."""
        ...

    async def reversals(self, user_id: str, seqs: Sequence[int]) -> dict[int, int]:
        """The numbers of the entries that reversed these, by theirs."""
        ...

    async def consumption(
        self, user_id: str, *, since: datetime | None, group: str
    ) -> list[tuple[str, Consumption]]:
        """Sums from hour `since` on; `group` is none, model, scene, hour or day."""
        ...

    async def lots(
        self, user_id: str, *, with_closed: bool, after: tuple[int, datetime, int] | None, limit: int
    ) -> list[Lot]:
        """In the order of their rank, each with what really remains."""
        ...

    async def budgets(self, user_id: str, *, after: tuple[datetime, str] | None, limit: int) -> list[Budget]: ...

    async def accounts_to_expire(
        self, *, now: datetime, after: tuple[datetime, str] | None, limit: int
    ) -> list[tuple[datetime, str]]:
        """Accounts with credit whose time is over."""
        ...

    async def hold(self, user_id: str, hold_id: UUID) -> Hold | None: ...

    async def holds_of_user(
        self, user_id: str, *, state: HoldState, before: tuple[datetime, UUID] | None, limit: int
    ) -> list[Hold]: ...

    async def expired_holds(
        self, *, origin: str, since: datetime, after: tuple[datetime, UUID] | None, limit: int
    ) -> list[Hold]: ...

    async def holds_to_expire(self, *, now: datetime, limit: int) -> list[tuple[str, UUID]]: ...

    def audit(
        self, user_ids: Sequence[str] | None, *, after_user_id: str = "", after_seq: int = 0
    ) -> AsyncIterator[AuditPart]:
        """All accounts after one (or those given) by user_id, each followed by its entries by seq; consistent per
        account. With `after_seq` the entry of that number comes first."""
        ...


@dataclass(frozen=True, slots=True)
class AccountPart:
    """The next account of an audit, with the sum of its open holds. `account` is None when only entries exist."""

    user_id: str
    account: Account | None
    held_micros: int
    lots: Sequence[Lot] = ()
    consumption: Mapping[ConsumptionKey, Consumption] = field(default_factory=dict)


AuditPart = AccountPart | Entry


class PriceRules(Protocol):
    """Price rules in the database."""

    async def add(self, rule: PriceRule, *, idempotency_key: str) -> PriceRule:
        """Stores a version, alone while it looks. Raises PriceRuleOverlap, or VersionTaken when that version exists."""
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


class Catalog(Protocol):
    """Products and reward rules in the database."""

    async def add_product(self, product: Product, *, idempotency_key: str) -> Product | None:
        """The stored one: an earlier one when the key was used before. None when the sku is taken."""
        ...

    async def product(self, product_id: str) -> Product | None: ...

    async def products(
        self, status: ProductStatus, *, after: tuple[int, str] | None, limit: int
    ) -> list[Product]: ...

    async def change_product(self, product_id: str, changes: Mapping[str, object], *, now: datetime) -> Product | None:
        """None when there is no such product."""
        ...

    async def add_reward_rule(self, rule: RewardRule, *, idempotency_key: str) -> RewardRule:
        """Stores it as the next version of its source, or answers what the key stored before."""
        ...

    async def reward_rule(self, source: str) -> RewardRule | None:
        """The newest version."""
        ...

    async def reward_rules(self, source: str, *, after: tuple[str, int] | None, limit: int) -> list[RewardRule]:
        """The newest of each source; of one source all versions, newest first."""
        ...


class OrderReader(Protocol):
    """Orders in the database."""

    async def order(self, order_id: UUID) -> Order | None: ...

    async def steps(self, user_id: str, order_id: UUID) -> list[OrderStep]: ...

    async def orders_of_user(
        self, user_id: str, status: OrderStatus | None, *, before: UUID | None, limit: int
    ) -> list[Order]: ...

    async def orders_to_refund(self, *, before: UUID | None, limit: int) -> list[Order]: ...

    async def pending_orders(self, *, created_before: datetime, limit: int) -> list[Order]: ...


class IssueState(IntEnum):
    """Where an issue stands; numbers as on the wire."""

    OPEN = 1
    RESOLVED = 2
    DISMISSED = 3


@dataclass(frozen=True, slots=True)
class StoredIssue:
    """An issue as it is kept."""

    issue_id: int
    user_id: str
    event_id: str
    kind: IssueKind
    detail: str
    seq: int
    original: bytes
    content_type: str
    origin: str
    state: IssueState
    noticed_at: datetime
    resolved_at: datetime | None = None
    resolved_by: str = ""
    note: str = ""


class Issues(Protocol):
    """Issues in the database; those of a batch are written with it."""

    async def add(self, issues: Sequence[StoredIssue]) -> None:
        """Adds those that are not there yet; issue_id, state and times are made here."""
        ...

    async def issue(self, issue_id: int) -> StoredIssue | None: ...

    async def issues(
        self, *, user_id: str, kind: IssueKind | None, state: IssueState, before: int | None, limit: int
    ) -> list[StoredIssue]: ...

    async def close(self, issue_id: int, state: IssueState, *, actor: str, note: str) -> StoredIssue | None:
        """None when it is not open."""
        ...


class SnapshotCache(Protocol):
    """Balances beside the database. An older snapshot never takes the place of a newer one (I12)."""

    async def get(self, user_ids: Sequence[str]) -> dict[str, Account]:
        """Those that are there; none when the cache is away."""
        ...

    async def put(self, accounts: Sequence[Account]) -> None: ...


class Lease(Protocol):
    """Who does a background job."""

    async def claim(self, name: str, *, seconds: float) -> str | None: ...

    async def move(self, name: str, cursor: str) -> bool: ...
