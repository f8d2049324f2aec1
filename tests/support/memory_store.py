"""A BookStore in memory that passes the same contract as PostgreSQL's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from servicekit.core.offsets import OffsetMove, StaleConsumer
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, BookKeys, Loaded, Wanted, keys_of, wanted_by
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.commands import ChargeIssue
from tokenstore_service.domain.consumption import Consumption, ConsumptionKey
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.lot import Lot
from tokenstore_service.domain.order import Order, OrderStep
from tokenstore_service.domain.period import Slot
from tokenstore_service.domain.policy import Policy
from tokenstore_service.domain.price_rule import PriceBook
from tokenstore_service.domain.pricing import price_charges
from tokenstore_service.domain.rules import apply
from tokenstore_service.usecases.ports import BookUnit, TransientFailure


class MemoryBooks:
    """What a database would hold. `fail_before` and `fail_after` make that many commits fail before, or after, they
    took effect."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.holds: dict[tuple[str, UUID], Hold] = {}
        self.entries: list[Entry] = []
        self.lots: dict[tuple[str, int], Lot] = {}
        self.orders: dict[tuple[str, UUID], Order] = {}
        self.steps: list[OrderStep] = []
        self.slots: list[Slot] = []
        self.budgets: dict[str, Budget] = {}
        self.consumption: dict[ConsumptionKey, Consumption] = {}
        self.issues: list[ChargeIssue] = []
        self.announced: list[Account] = []
        self.offsets: dict[tuple[str, int], int] = {}
        self.fail_before = 0
        self.fail_after = 0
        self.batches: list[int] = []

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[BookUnit]:
        yield _MemoryUnit(self)

    def load(self, keys: BookKeys) -> Loaded:
        reversed_seqs = keys.reversed_seqs
        return copy.deepcopy(Loaded(
            accounts=[account for user, account in self.accounts.items() if user in keys.user_ids],
            holds=[
                hold for key, hold in self.holds.items()
                if key in keys.hold_ids
                or (
                    (hold.user_id, hold.request_id) in keys.request_ids
                    and hold.state in (HoldState.OPEN, HoldState.SETTLED)
                )
                or (hold.user_id in keys.open_hold_users and hold.state is HoldState.OPEN)
            ],
            entries=[
                entry for entry in self.entries
                if (entry.user_id, entry.event_id) in keys.event_ids or (entry.user_id, entry.seq) in reversed_seqs
                or (entry.user_id, entry.reverses_seq) in reversed_seqs
            ],
            lots=[lot for lot in self.lots.values() if lot.user_id in keys.lot_users and lot.remaining_micros],
            whole_lot_users=frozenset(keys.lot_users),
            orders=[
                order for key, order in self.orders.items()
                if key in keys.order_ids or (order.user_id, order.idempotency_key) in keys.order_keys
            ],
            slots=[slot for slot in self.slots if (slot.user_id, slot.subject, slot.period_start) in keys.slots],
            budgets=[budget for budget in self.budgets.values() if budget.user_id in keys.budget_users],
        ))

    def load_more(self, loaded: Loaded, wanted: Wanted) -> Loaded:
        lots = {(lot.user_id, lot.seq): lot for lot in loaded.lots}
        for user, needed in wanted.lots_up_to.items():
            before = 0
            account = self.accounts[user]
            stored = [lot for lot in self.lots.values() if lot.user_id == user and lot.remaining_micros]
            for lot in sorted(stored, key=lambda lot: lot.rank):
                if needed is None or before <= needed:
                    lots[(user, lot.seq)] = copy.deepcopy(lot)
                before += account.head_lot_micros if lot.seq == account.head_lot else lot.remaining_micros
        for key in wanted.lot_seqs & self.lots.keys():
            lots.setdefault(key, copy.deepcopy(self.lots[key]))
        budgets = [budget for budget in self.budgets.values() if budget.user_id in wanted.budget_users]
        whole = {user for user, needed in wanted.lots_up_to.items() if needed is None}
        loaded.lots = list(lots.values())
        loaded.whole_lot_users |= whole
        loaded.budgets = [*loaded.budgets, *copy.deepcopy(budgets)]
        return loaded

    def save(self, book: Book) -> None:
        self.batches.append(len(book.new_entries))
        for account in [*book.new_accounts, *book.changed_accounts]:
            self.accounts[account.user_id] = account
        self.holds.update(book.new_holds)
        self.holds.update(book.changed_holds)
        self.entries += book.new_entries
        for lot in copy.deepcopy([*book.new_lots, *book.changed_lots]):
            self.lots[(lot.user_id, lot.seq)] = lot
        self.orders.update(book.new_orders)
        self.orders.update(book.changed_orders)
        self.steps += book.new_steps
        self.slots = [slot for slot in self.slots if (slot.user_id, slot.holder) not in book.freed_holders]
        self.slots += book.new_slots
        self.budgets.update(book.new_budgets)
        self.budgets.update(book.changed_budgets)
        for budget in book.deleted_budgets:
            self.budgets.pop(budget.budget_id, None)
        for key, sums in book.consumption.items():
            self.consumption[key] = self.consumption.get(key, Consumption()).plus(Consumption(*sums))
        self.issues += book.issues
        self.announced += copy.deepcopy(book.announced)

    def true_lots(self, user: str) -> list[Lot]:
        """Lots with what really remains: the head's is in its account."""
        account = self.accounts[user]
        lots = [copy.copy(lot) for lot in self.lots.values() if lot.user_id == user]
        for lot in lots:
            if lot.seq == account.head_lot:
                lot.remaining_micros = account.head_lot_micros
        return lots

    def run(self, commands: Sequence[Any], *, now: datetime, prices: PriceBook, policy: Policy) -> list[Any]:
        """One batch, without a writer around it."""
        keys = keys_of(commands, now)
        loaded = self.load(keys)
        priced = price_charges(commands, prices)
        wanted = wanted_by(loaded, keys, commands, priced, now)
        if wanted:
            loaded = self.load_more(loaded, wanted)
        book = Book(loaded, prices=prices, now=now, policy=policy, priced=priced)
        answers = [apply(book, command) for command in commands]
        book.finish()
        self.save(book)
        return answers


class _MemoryUnit:
    def __init__(self, books: MemoryBooks) -> None:
        self._books = books
        self._book: Book | None = None
        self._moves: Sequence[OffsetMove] = ()

    async def load(self, keys: BookKeys) -> Loaded:
        return self._books.load(keys)

    async def load_more(self, loaded: Loaded, wanted: Wanted) -> Loaded:
        return self._books.load_more(loaded, wanted)

    async def send(self, book: Book) -> None:
        pass

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
        books.save(book)
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
