"""The arithmetic of a batch: commands against the accounts, lots, holds and entries that they touch, all in memory.

The caller loads what the commands name (`keys_of`), and what the accounts then ask for (`wanted_by`), while it holds
the accounts' locks; applies the commands in order (`rules.apply`); calls `finish`; and writes what changed. So a batch
costs the same few statements whatever is in it, and the rules need no database to be tested.

A charge that fits into the lot at the head of its account touches no lot's row: see Account.head_lot.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from tokenstore_service.domain.account import MOST_MICROS, Account
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.commands import (
    AdjustBalance,
    ChargeIssue,
    CloseOrder,
    Command,
    CreateOrder,
    DeleteBudget,
    ExpireLots,
    GrantReward,
    OpenHold,
    PayOrder,
    RecordCharge,
    RefundOrder,
    Reprice,
    ReverseEntry,
    SetBudget,
    SetOverdraftLimit,
)
from tokenstore_service.domain.consumption import ConsumptionKey, add_entry, consumption_key, new_sums
from tokenstore_service.domain.correction import correction_event
from tokenstore_service.domain.entry import Entry, EntrySource, EntryStatus, entry_hash, microseconds_of
from tokenstore_service.domain.errors import AmountOutOfRange
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.lot import Lot, LotUse, take_from, uses_from_text, uses_to_text
from tokenstore_service.domain.order import ALLOWED, Order, OrderStatus, OrderStep
from tokenstore_service.domain.period import Slot, period_start
from tokenstore_service.domain.policy import DEFAULT_POLICY, Policy
from tokenstore_service.domain.price_rule import PriceBook
from tokenstore_service.domain.pricing import Priced

HoldId = tuple[str, UUID]
EventId = tuple[str, str]
RequestId = tuple[str, str]
SlotKey = tuple[str, str, datetime]


@dataclass(slots=True)
class BookKeys:
    """What a batch touches. `lot_users`: all their open lots; `reversed_seqs`: these entries and their reversals."""

    user_ids: set[str] = field(default_factory=set)
    hold_ids: set[HoldId] = field(default_factory=set)
    request_ids: set[RequestId] = field(default_factory=set)
    event_ids: set[EventId] = field(default_factory=set)
    lot_users: set[str] = field(default_factory=set)
    reversed_seqs: set[tuple[str, int]] = field(default_factory=set)
    order_ids: set[tuple[str, UUID]] = field(default_factory=set)
    order_keys: set[tuple[str, str]] = field(default_factory=set)
    slots: set[SlotKey] = field(default_factory=set)
    budget_users: set[str] = field(default_factory=set)
    open_hold_users: set[str] = field(default_factory=set)


def repriced_event(event_id: str) -> str:
    """The event id of the entry that prices another one later."""
    return f"reprice:{event_id}"


def order_event(order_id: UUID) -> str:
    """The event id of the entry that credits an order."""
    return f"order:{order_id}"


def limited_slot(command: CreateOrder | GrantReward, now: datetime) -> SlotKey | None:
    """The limit that a command counts against; None when it has none."""
    if isinstance(command, CreateOrder):
        limit, subject = command.product.purchase_limit, f"product:{command.product.product_id}"
    else:
        limit, subject = command.rule.limit, f"reward:{command.rule.source}"
    return None if limit is None else (command.user_id, subject, period_start(limit.period, now))


def keys_of(commands: Iterable[Command], now: datetime) -> BookKeys:
    keys = BookKeys()
    for command in commands:
        user = command.user_id
        keys.user_ids.add(user)
        match command:
            case RecordCharge():
                keys.event_ids.add((user, command.event_id))
                if command.call_id is not None:
                    keys.hold_ids.add((user, command.call_id))
                    if command.corrects:
                        keys.event_ids |= {(user, command.corrects), (user, correction_event(command.corrects))}
                        keys.lot_users.add(user)
            case OpenHold():
                keys.hold_ids.add((user, command.hold_id))
                if command.request_id:
                    keys.request_ids.add((user, command.request_id))
            case Reprice():
                keys.event_ids |= {(user, command.event_id), (user, repriced_event(command.event_id))}
                keys.lot_users.add(user)
            case AdjustBalance():
                keys.event_ids.add((user, command.idempotency_key))
                keys.lot_users.add(user)
            case ReverseEntry():
                keys.event_ids.add((user, command.idempotency_key))
                keys.reversed_seqs.add((user, command.seq))
                keys.lot_users.add(user)
            case GrantReward():
                keys.event_ids.add((user, command.event_id))
                keys.lot_users.add(user)
                keys.slots |= {slot} if (slot := limited_slot(command, now)) else set()
            case CreateOrder():
                keys.order_keys.add((user, command.idempotency_key))
                keys.slots |= {slot} if (slot := limited_slot(command, now)) else set()
                keys.lot_users.add(user)
            case PayOrder() | CloseOrder():
                keys.order_ids.add((user, command.order_id))
                keys.lot_users.add(user)
            case RefundOrder():
                keys.order_ids.add((user, command.order_id))
                keys.event_ids.add((user, command.idempotency_key))
                keys.lot_users.add(user)
            case ExpireLots():
                keys.lot_users.add(user)
            case SetBudget() | DeleteBudget():
                keys.budget_users.add(user)
                keys.open_hold_users.add(user)
            case SetOverdraftLimit():
                pass
            case _:
                keys.hold_ids.add((user, command.hold_id))
    return keys


@dataclass(slots=True)
class Loaded:
    """What a batch touches, as it is while the accounts are locked. `whole_lot_users`: all their open lots are here."""

    accounts: Sequence[Account] = ()
    holds: Sequence[Hold] = ()
    entries: Sequence[Entry] = ()
    lots: Sequence[Lot] = ()
    whole_lot_users: frozenset[str] = frozenset()
    orders: Sequence[Order] = ()
    slots: Sequence[Slot] = ()
    budgets: Sequence[Budget] = ()


@dataclass(slots=True)
class Wanted:
    """What the accounts ask for once they are known."""

    lots_up_to: dict[str, int | None] = field(default_factory=dict)
    """Open lots in the order of spending until they make up these micro-credits, and one more; None = all."""
    lot_seqs: set[tuple[str, int]] = field(default_factory=set)
    budget_users: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.lots_up_to or self.lot_seqs or self.budget_users)


def wanted_by(
    loaded: Loaded, keys: BookKeys, commands: Iterable[Command], priced: Mapping[int, Priced], now: datetime
) -> Wanted:
    """Lots of accounts whose head does not suffice or that have credit to expire, lots to give back to, budgets."""
    charged: dict[str, int] = {}
    corrected: set[EventId] = set()
    for command in commands:
        if isinstance(command, RecordCharge):
            if command.corrects:
                corrected.add((command.user_id, command.corrects))
            charged[command.user_id] = charged.get(command.user_id, 0) + priced[id(command)].micros
    wanted = Wanted()
    for account in loaded.accounts:
        user, head = account.user_id, account.head_lot_micros
        if account.has_budgets and user not in keys.budget_users:
            wanted.budget_users.add(user)
        if user in keys.lot_users:
            continue
        if account.next_expiry_at is not None and account.next_expiry_at <= moment_of(account, now):
            wanted.lots_up_to[user] = None
        elif charged.get(user, 0) >= head and account.balance_micros > head:
            wanted.lots_up_to[user] = charged.get(user, 0)
    reversed_entries = {(entry.user_id, entry.seq): entry for entry in loaded.entries}
    for key in keys.reversed_seqs & reversed_entries.keys():
        wanted.lot_seqs.add(key)
        wanted.lot_seqs |= {(key[0], seq) for seq, _ in uses_from_text(reversed_entries[key].lots)}
    for entry in loaded.entries if corrected else ():
        if (entry.user_id, entry.event_id) in corrected:
            wanted.lot_seqs |= {(entry.user_id, seq) for seq, _ in uses_from_text(entry.lots)}
    wanted.lot_seqs |= {(order.user_id, order.credit_seq) for order in loaded.orders if order.credit_seq}
    return wanted


class Book:
    """One batch. `prices` must know every rule version that the commands quote."""

    def __init__(
        self, loaded: Loaded, *, prices: PriceBook, now: datetime, policy: Policy = DEFAULT_POLICY,
        priced: Mapping[int, Priced] | None = None,
    ) -> None:
        self.prices = prices
        self.now = now
        self.policy = policy
        self.priced = priced or {}
        self._accounts = {account.user_id: account for account in loaded.accounts}
        self._known_users = frozenset(self._accounts)
        self._touched: set[str] = set()
        self.widely_changed: set[str] = set()
        """Users whose account changed in more than holds and charges change."""
        self.entries: dict[EventId, Entry] = {(entry.user_id, entry.event_id): entry for entry in loaded.entries}
        self.new_entries: list[Entry] = []
        self.holds: dict[HoldId, Hold] = {}
        self.requests: dict[RequestId, Hold] = {}
        self.new_holds: dict[HoldId, Hold] = {}
        self.changed_holds: dict[HoldId, Hold] = {}
        for hold in loaded.holds:
            self.remember_hold(hold)
        self._lots: dict[str, dict[int, Lot]] = {user: {} for user in loaded.whole_lot_users}
        self._whole_lot_users = loaded.whole_lot_users
        self._stored_lots: dict[tuple[str, int], tuple[int, datetime | None]] = {}
        self._load_lots(loaded.lots)
        self.new_lots: list[Lot] = []
        self.changed_lots: list[Lot] = []
        self.consumption: dict[ConsumptionKey, list[int]] = {}
        self.issues: list[ChargeIssue] = []
        self.orders = {(order.user_id, order.order_id): order for order in loaded.orders}
        self.new_orders: dict[tuple[str, UUID], Order] = {}
        self.changed_orders: dict[tuple[str, UUID], Order] = {}
        self.new_steps: list[OrderStep] = []
        self.slots: dict[SlotKey, list[Slot]] = {}
        for slot in loaded.slots:
            self.slots.setdefault((slot.user_id, slot.subject, slot.period_start), []).append(slot)
        self.new_slots: list[Slot] = []
        self.freed_holders: list[tuple[str, str]] = []
        """User and holder of places in limits that are free again."""
        self.budgets: dict[str, dict[str, Budget]] = {}
        for budget in loaded.budgets:
            budget.roll(now)
            self.budgets.setdefault(budget.user_id, {})[budget.budget_id] = budget
        self.new_budgets: dict[str, Budget] = {}
        self.changed_budgets: dict[str, Budget] = {}
        self.deleted_budgets: list[Budget] = []
        self.announced: list[Account] = []
        self.low_accounts: dict[str, int] = {}

    # What is to be written

    @property
    def new_accounts(self) -> list[Account]:
        return [self._accounts[user] for user in sorted(self._touched - self._known_users)]

    @property
    def changed_accounts(self) -> list[Account]:
        return [self._accounts[user] for user in sorted(self._touched & self._known_users)]

    def finish(self) -> None:
        """Makes heads, lots and announcements ready to be written; call it once, after the last command."""
        # An entry that is not a charge is worth telling, if anything is told.
        entered = {entry.user_id for entry in self.new_entries if entry.source is not EntrySource.CHARGE}
        for user in self._touched:
            account = self._accounts[user]
            if user in self._lots:
                self.widely_changed.add(user)
                self._finish_lots(account)
            if self.policy.low_balances or self.policy.announce:
                self._announce(account, is_notable=user in entered)

    def _finish_lots(self, account: Account) -> None:
        user = account.user_id
        lots = self._lots[user]
        remaining = [lot for lot in lots.values() if lot.remaining_micros > 0]
        head = min(remaining, key=lambda lot: lot.rank, default=None)
        account.head_lot = head.seq if head else 0
        account.head_lot_micros = head.remaining_micros if head else 0
        if user in self._whole_lot_users:
            account.next_expiry_at = min((lot.expires_at for lot in remaining if lot.expires_at), default=None)
        new = {lot.seq for lot in self.new_lots if lot.user_id == user}
        for lot in lots.values():
            stored = self._stored_lots.get((user, lot.seq))
            if lot.seq in new or stored == (lot.remaining_micros, lot.expires_at):
                continue
            if lot is not head or stored is None or stored[1] != lot.expires_at or stored[0] == 0:
                self.changed_lots.append(lot)

    def _announce(self, account: Account, *, is_notable: bool) -> None:
        level = _low_level(account, self.policy)
        fell = level > account.low_level
        if level != account.low_level:
            self.widely_changed.add(account.user_id)
        account.low_level = level
        if self.policy.announce and (fell or self.policy.announce_all or is_notable):
            self.announced.append(account)
            if fell:
                self.low_accounts[account.user_id] = self.policy.low_balances[level - 1]

    # Accounts

    def account(self, user_id: str) -> Account:
        """The account, made in memory if it is new; credit whose time is over is booked out first."""
        account = self._accounts.get(user_id)
        if account is None:
            account = self._accounts[user_id] = Account(user_id)
        elif account.next_expiry_at is not None and account.next_expiry_at <= self.moment(account):
            self.expire_due(account)
        return account

    def touch(self, account: Account) -> Account:
        """Only touched accounts are written: a refused hold makes no account."""
        account.updated_at = self.moment(account)
        if account.user_id not in self._touched:
            account.version += 1
            self._touched.add(account.user_id)
        return account

    def moment(self, account: Account) -> datetime:
        """Now, but never before the account's last change: time never goes back within an account."""
        return moment_of(account, self.now)

    # Lots

    def _load_lots(self, lots: Iterable[Lot]) -> None:
        for lot in lots:
            self._lots.setdefault(lot.user_id, {})[lot.seq] = lot
            self._stored_lots[(lot.user_id, lot.seq)] = (lot.remaining_micros, lot.expires_at)
            account = self._accounts.get(lot.user_id)
            if account is not None and account.head_lot == lot.seq:
                lot.remaining_micros = account.head_lot_micros

    def lot(self, user_id: str, seq: int) -> Lot | None:
        return self._lots.get(user_id, {}).get(seq)

    def due_micros(self, account: Account) -> int:
        """Credit whose time is over and that could not be booked out, because a running call holds it."""
        now = self.moment(account)
        if account.next_expiry_at is None or account.next_expiry_at > now:
            return 0
        return sum(lot.remaining_micros for lot in self._lots[account.user_id].values() if lot.is_due(now))

    def expire_due(self, account: Account) -> list[Entry]:
        """Books the end of each lot whose time is over. A lot that a running call may still use waits for it, whole."""
        booked = []
        lots, now = self._lots[account.user_id].values(), self.moment(account)
        for lot in sorted((lot for lot in lots if lot.is_due(now)), key=lambda lot: lot.rank):
            assert lot.expires_at is not None
            if 0 < lot.remaining_micros <= account.available_micros:
                booked.append(self.book_expense(
                    account, lot.remaining_micros, first=(lot.seq,), source=EntrySource.EXPIRY,
                    event_id=f"expiry:{lot.seq}:{microseconds_of(lot.expires_at)}", order_id=lot.order_id,
                    description=f"validity of entry {lot.seq} ended",
                ))
        return booked

    def take_lots(self, account: Account, micros: int) -> str:
        """What an expense of so many micro-credits uses, as an entry keeps it."""
        return self._take(account, micros, ()) if micros else ""

    def _take(self, account: Account, micros: int, first: Sequence[int]) -> str:
        lots = self._lots.get(account.user_id)
        if lots is None:
            part = min(account.head_lot_micros, micros)
            account.head_lot_micros -= part
            return f"{account.head_lot}:{part}" if part > 0 else ""
        order = sorted(lots.values(), key=lambda lot: (lot.seq not in first, lot.rank))
        return uses_to_text(take_from(order, micros))

    def _give_back(self, account: Account, micros: int, uses: Sequence[LotUse]) -> tuple[list[LotUse], datetime | None]:
        """Gives back to the lots of `uses`, last used first; one whose time is over reopens for the grace, if any."""
        done: list[LotUse] = []
        reopened_until: datetime | None = None
        now = self.moment(account)
        for seq, most in reversed(uses):
            lot = self.lot(account.user_id, seq)
            part = min(most, micros)
            if lot is None or part <= 0:
                continue
            if lot.is_due(now):
                if not self.policy.lot_grace:
                    continue
                lot.expires_at = reopened_until = now + self.policy.lot_grace
            lot.remaining_micros += part
            micros -= part
            done.append((seq, part))
        return done, reopened_until

    # Entries

    def in_range(self, account: Account, change: int) -> bool:
        room = MOST_MICROS - abs(change)
        return (
            -room <= account.balance_micros <= room and -room <= account.total_consumed_micros <= room
            and -room <= account.total_rewarded_micros <= room and -room <= account.total_recharged_micros <= room
        )

    def book_expense(self, account: Account, micros: int, *, first: Sequence[int] = (), **fields: Any) -> Entry:
        """An entry of -micros (>= 0): out of the lots `first`, then the others in their order, then below zero."""
        lots = self._take(account, micros, first) if micros else ""
        return self._append(account, -micros, lots=lots, **fields)

    def book_income(
        self, account: Account, micros: int, *, lot_source: EntrySource, lot_priority: int,
        lot_expires_at: datetime | None = None, give_back: Sequence[LotUse] = (), **fields: Any,
    ) -> Entry:
        """An entry of +micros: pays a debt, gives back to lots, and makes the rest a new lot."""
        rest = micros - min(max(-account.balance_micros, 0), micros)
        uses, reopened_until = self._give_back(account, rest, give_back)
        left = rest - sum(part for _, part in uses)
        if left:
            lot_expires_at = reopened_until or lot_expires_at
            terms: dict[str, Any] = {
                "lot_source": lot_source, "lot_priority": lot_priority, "lot_expires_at": lot_expires_at
            }
        else:
            terms = {"lot_expires_at": reopened_until}
        entry = self._append(account, micros, lots=uses_to_text(uses), **terms, **fields)
        if left:
            lot = Lot(
                user_id=account.user_id, seq=entry.seq, source=lot_source, priority=lot_priority, granted_micros=left,
                remaining_micros=left, expires_at=lot_expires_at, order_id=entry.order_id, granted_at=entry.booked_at,
            )
            self._lots[account.user_id][lot.seq] = lot
            self.new_lots.append(lot)
        return entry

    def _append(
        self, account: Account, amount: int, *, source: EntrySource, event_id: str,
        status: EntryStatus = EntryStatus.APPLIED, occurred_at: datetime | None = None, **fields: Any,
    ) -> Entry:
        booked_at = self.moment(account)
        self.widely_changed.add(account.user_id)
        return self.post(account, Entry(
            user_id=account.user_id, seq=account.seq + 1, event_id=event_id, source=source, amount_micros=amount,
            balance_after_micros=account.balance_micros + amount, status=status, occurred_at=occurred_at or booked_at,
            booked_at=booked_at, **fields,
        ))

    def post(self, account: Account, entry: Entry) -> Entry:
        """Seals the account's next entry and moves the account on."""
        entry.entry_hash = entry_hash(account.head_hash, entry)
        self.touch(account)
        account.balance_micros = entry.balance_after_micros
        account.seq = entry.seq
        account.head_hash = entry.entry_hash
        add_to_totals(account, entry)
        self.entries[(entry.user_id, entry.event_id)] = entry
        self.new_entries.append(entry)
        if entry.counts_as_consumption:
            key = consumption_key(entry)
            sums = self.consumption.get(key)
            if sums is None:
                sums = self.consumption[key] = new_sums()
            add_entry(sums, entry)
        return entry

    def require_range(self, account: Account, change: int) -> None:
        if not self.in_range(account, change):
            raise AmountOutOfRange("the balance would leave its range")

    # Holds

    def remember_hold(self, hold: Hold) -> None:
        self.holds[(hold.user_id, hold.hold_id)] = hold
        if hold.request_id and hold.state in (HoldState.OPEN, HoldState.SETTLED):
            self.requests[(hold.user_id, hold.request_id)] = hold

    def mark_hold(self, hold: Hold) -> None:
        key = (hold.user_id, hold.hold_id)
        if key not in self.new_holds:
            self.changed_holds[key] = hold

    # Orders

    def step_order(self, order: Order, status: OrderStatus, *, actor: str, note: str) -> None:
        """Moves an order on, where that is allowed, and writes it down in its history."""
        assert order.steps == 0 or status is order.status or (order.status, status) in ALLOWED
        key = (order.user_id, order.order_id)
        order.status = status
        order.steps += 1
        self.new_steps.append(OrderStep(order.user_id, order.order_id, order.steps, status, self.now, actor, note))
        self.mark_order(order)
        self.orders[key] = order

    def mark_order(self, order: Order) -> None:
        key = (order.user_id, order.order_id)
        if key not in self.new_orders:
            self.changed_orders[key] = order

    # Limits and budgets

    def take_slots(self, key: SlotKey, wanted: int, count: int, holder: str) -> bool:
        """`wanted` of the `count` places of a limit; False, and none taken, when there are not so many."""
        taken = self.slots.setdefault(key, [])
        free = sorted(set(range(1, count + 1)) - {slot.number for slot in taken})
        if len(free) < wanted:
            return False
        slots = [Slot(*key, number, holder) for number in free[:wanted]]
        taken += slots
        self.new_slots += slots
        return True

    def mark_budget(self, budget: Budget) -> None:
        budget.updated_at = self.now
        if budget.budget_id not in self.new_budgets:
            self.changed_budgets[budget.budget_id] = budget


def moment_of(account: Account, now: datetime) -> datetime:
    return now if account.updated_at is None else max(now, account.updated_at)


def add_to_totals(account: Account, entry: Entry) -> None:
    """Keeps recharged + rewarded - consumed = balance: what was bought less refunds, what was given, what was spent."""
    amount = entry.amount_micros
    match entry.source:
        case EntrySource.PURCHASE | EntrySource.REFUND:
            account.total_recharged_micros += amount
        case EntrySource.CHARGE | EntrySource.EXPIRY:
            account.total_consumed_micros -= amount
        case EntrySource.REVERSAL:
            if amount > 0:
                account.total_consumed_micros -= amount
            else:
                account.total_rewarded_micros += amount
        case _:
            if amount > 0:
                account.total_rewarded_micros += amount
            else:
                account.total_consumed_micros -= amount


def _low_level(account: Account, policy: Policy) -> int:
    """How many thresholds the balance is under; it counts as above one again only some way above it."""
    balance = account.balance_micros
    under = sum(balance < threshold for threshold in policy.low_balances)
    if under >= account.low_level:
        return under
    still_under = sum(
        balance * 100 < threshold * (100 + policy.rise_percent) for threshold in policy.low_balances
    )
    return max(under, min(account.low_level, still_under))


def snapshot(account: Account) -> Account:
    return copy.copy(account)
