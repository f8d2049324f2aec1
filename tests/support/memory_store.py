"""A BookStore in memory that passes the same contract as PostgreSQL's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncIterator, Iterable, Sequence
from uuid import UUID

from servicekit.core.offsets import OffsetMove, StaleConsumer
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, BookKeys
from tokenstore_service.domain.commands import ChargeIssue
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.price_rule import PriceBook
from tokenstore_service.usecases.ports import BookUnit, Loaded, TransientFailure


class MemoryBooks:
    """What a database would hold. `fail_next` makes that many commits fail before, or after, they took effect."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.holds: dict[tuple[str, UUID], Hold] = {}
        self.entries: list[Entry] = []
        self.issues: list[ChargeIssue] = []
        self.offsets: dict[tuple[str, int], int] = {}
        self.fail_before = 0
        self.fail_after = 0
        self.batches: list[int] = []

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[BookUnit]:
        yield _MemoryUnit(self)


class _MemoryUnit:
    def __init__(self, books: MemoryBooks) -> None:
        self._books = books
        self._book: Book | None = None
        self._moves: Sequence[OffsetMove] = ()

    async def load(self, keys: BookKeys) -> Loaded:
        books = self._books
        return copy.deepcopy(Loaded(
            accounts=[account for user, account in books.accounts.items() if user in keys.user_ids],
            holds=[
                hold for key, hold in books.holds.items()
                if key in keys.hold_ids or (
                    (hold.user_id, hold.request_id) in keys.request_ids
                    and hold.state in (HoldState.OPEN, HoldState.SETTLED)
                )
            ],
            entries=[entry for entry in books.entries if (entry.user_id, entry.event_id) in keys.event_ids],
        ))

    async def save(self, book: Book, moves: Sequence[OffsetMove]) -> None:
        for move in moves:
            if self._books.offsets.get((move.topic, move.partition), 0) != move.first:
                raise StaleConsumer("not as expected")
        self._book, self._moves = book, moves

    async def commit(self) -> None:
        books, book = self._books, self._book
        assert book is not None
        if books.fail_before:
            books.fail_before -= 1
            raise TransientFailure
        books.batches.append(len(book.new_entries))
        for account in [*book.new_accounts, *book.changed_accounts]:
            books.accounts[account.user_id] = account
        books.holds.update(book.new_holds)
        books.holds.update(book.changed_holds)
        books.entries += book.new_entries
        books.issues += book.issues
        books.offsets.update({(move.topic, move.partition): move.next for move in self._moves})
        if books.fail_after:
            books.fail_after -= 1
            raise TransientFailure


class FixedPrices:
    """A price book that never changes."""

    def __init__(self, book: PriceBook) -> None:
        self.book = book

    async def ensure(self, versions: Iterable[tuple[str, int]]) -> None:
        pass

    async def refresh(self) -> None:
        pass
