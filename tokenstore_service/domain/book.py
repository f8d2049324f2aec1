"""The arithmetic of a batch: commands against the accounts, holds and entries that they touch, all in memory.

The caller loads what the commands name (see `keys_of`) while it holds the accounts' locks, applies the commands in
order, and writes what changed. So a batch costs the same few statements whatever is in it, and the rules need no
database to be tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

from metering.charge import Quote, Rates, charge_micros
from servicekit.core.errors import IdempotencyConflict
from tokenstore_service.domain.account import MOST_MICROS, Account
from tokenstore_service.domain.commands import (
    AdjustBalance,
    Answer,
    BalanceAdjusted,
    ChargeIssue,
    ChargeRecorded,
    Command,
    ExpireHold,
    ExtendHold,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    OpenHold,
    RecordCharge,
    RecordStatus,
    ReleaseHold,
)
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource, EntryStatus, entry_hash
from tokenstore_service.domain.errors import AmountOutOfRange
from tokenstore_service.domain.hold import Hold, HoldState, size_hold
from tokenstore_service.domain.price_rule import PriceBook

HoldId = tuple[str, UUID]
EventId = tuple[str, str]
RequestId = tuple[str, str]


@dataclass(slots=True)
class BookKeys:
    """What a batch touches."""

    user_ids: set[str] = field(default_factory=set)
    hold_ids: set[HoldId] = field(default_factory=set)
    request_ids: set[RequestId] = field(default_factory=set)
    event_ids: set[EventId] = field(default_factory=set)


def keys_of(commands: Iterable[Command]) -> BookKeys:
    keys = BookKeys()
    for command in commands:
        keys.user_ids.add(command.user_id)
        match command:
            case OpenHold():
                keys.hold_ids.add((command.user_id, command.hold_id))
                if command.request_id:
                    keys.request_ids.add((command.user_id, command.request_id))
            case RecordCharge():
                keys.event_ids.add((command.user_id, command.event_id))
                if command.call_id is not None:
                    keys.hold_ids.add((command.user_id, command.call_id))
            case AdjustBalance():
                keys.event_ids.add((command.user_id, command.idempotency_key))
            case _:
                keys.hold_ids.add((command.user_id, command.hold_id))
    return keys


class Book:
    """One batch. `prices` must know every rule version that the commands quote."""

    def __init__(
        self, *, accounts: Iterable[Account], holds: Iterable[Hold], entries: Iterable[Entry], prices: PriceBook,
        now: datetime,
    ) -> None:
        self._accounts = {account.user_id: account for account in accounts}
        self._known_users = frozenset(self._accounts)
        self._holds: dict[HoldId, Hold] = {}
        self._requests: dict[RequestId, Hold] = {}
        self._entries: dict[EventId, Entry] = {(entry.user_id, entry.event_id): entry for entry in entries}
        self._prices = prices
        self._now = now
        self.new_entries: list[Entry] = []
        self.new_holds: dict[HoldId, Hold] = {}
        self.changed_holds: dict[HoldId, Hold] = {}
        self.issues: list[ChargeIssue] = []
        self._touched: set[str] = set()
        for hold in holds:
            self._remember(hold)

    @property
    def new_accounts(self) -> list[Account]:
        return [self._accounts[user] for user in sorted(self._touched - self._known_users)]

    @property
    def changed_accounts(self) -> list[Account]:
        return [self._accounts[user] for user in sorted(self._touched & self._known_users)]

    def apply(self, command: Command) -> Answer | Exception:
        """The answer, or the error that only this command's caller is told. Nothing is half applied."""
        match command:
            case OpenHold():
                return self._open_hold(command)
            case RecordCharge():
                return self._record_charge(command)
            case ExtendHold():
                return self._extend_hold(command)
            case ReleaseHold():
                return self._close_hold(command, HoldState.RELEASED)
            case ExpireHold():
                return self._expire_hold(command)
            case AdjustBalance():
                return self._adjust_balance(command)

    # Holds

    def _remember(self, hold: Hold) -> None:
        self._holds[(hold.user_id, hold.hold_id)] = hold
        if hold.request_id and hold.state in (HoldState.OPEN, HoldState.SETTLED):
            self._requests[(hold.user_id, hold.request_id)] = hold

    def _open_hold(self, command: OpenHold) -> HoldGranted | HoldRefused:
        known = self._holds.get((command.user_id, command.hold_id))
        if known is not None:
            return self._reopen(command, known)
        earlier = self._requests.get((command.user_id, command.request_id)) if command.request_id else None
        if earlier is not None and earlier.state in (HoldState.OPEN, HoldState.SETTLED):
            return _refused_for(earlier, command)
        account = self._account(command.user_id)
        rule = self._prices.match(
            scene=command.scene, provider=command.provider, model=command.model, at=self._now
        )
        rates = Rates() if rule is None or command.skip_charge else rule.rates
        size = size_hold(
            holdable_micros=MOST_MICROS if command.skip_charge else account.holdable_micros, rates=rates,
            input_tokens=command.input_tokens, max_output_tokens=command.max_output_tokens,
            min_output_tokens=command.min_output_tokens,
        )
        if not size.granted:
            return HoldRefused(
                "INSUFFICIENT_CREDIT", needed_micros=size.micros, available_micros=account.available_micros
            )
        hold = Hold(
            user_id=command.user_id, hold_id=command.hold_id, request_id=command.request_id, scene=command.scene,
            provider=command.provider, model=command.model, held_micros=size.micros,
            input_tokens=command.input_tokens, max_output_tokens=size.output_tokens,
            asked_output_tokens=command.max_output_tokens,
            price_rule_id=rule.rule_id if rule else "", price_rule_version=rule.version if rule else 0,
            request_fingerprint=command.request_fingerprint, skip_charge=command.skip_charge, origin=command.origin,
            state=HoldState.OPEN,
            opened_at=self._now, expires_at=self._now + command.ttl,
        )
        self._touch(account).held_micros += size.micros
        self._remember(hold)
        self.new_holds[(hold.user_id, hold.hold_id)] = hold
        return HoldGranted(copy.copy(hold), rule.quote if rule else None)

    def _reopen(self, command: OpenHold, known: Hold) -> HoldGranted | HoldRefused:
        """The same call asks again, e.g. because it never heard the answer."""
        same = (
            known.request_id == command.request_id and known.scene == command.scene
            and known.provider == command.provider and known.model == command.model
            and known.input_tokens == command.input_tokens
            and known.asked_output_tokens == command.max_output_tokens
            and known.request_fingerprint == command.request_fingerprint and known.skip_charge == command.skip_charge
        )
        if not same or known.state is not HoldState.OPEN:
            return HoldRefused("IDEMPOTENCY_CONFLICT", existing_call_id=str(known.hold_id))
        rule = self._prices.version(known.price_rule_id, known.price_rule_version)
        return HoldGranted(copy.copy(known), rule.quote if rule else None)

    def _extend_hold(self, command: ExtendHold) -> HoldChanged:
        hold = self._holds.get((command.user_id, command.hold_id))
        if hold is None:
            return HoldChanged(command.hold_id, None, None)
        if hold.state is HoldState.OPEN and self._now + command.ttl > hold.expires_at:
            hold.expires_at = self._now + command.ttl
            self._mark_changed(hold)
        return HoldChanged(hold.hold_id, hold.state, hold.closed_at or hold.expires_at)

    def _expire_hold(self, command: ExpireHold) -> HoldChanged:
        hold = self._holds.get((command.user_id, command.hold_id))
        if hold is not None and hold.state is HoldState.OPEN and hold.expires_at > self._now:
            return HoldChanged(hold.hold_id, hold.state, hold.expires_at)  # extended meanwhile
        return self._close_hold(command, HoldState.EXPIRED)

    def _close_hold(self, command: ReleaseHold | ExpireHold, state: HoldState) -> HoldChanged:
        hold = self._holds.get((command.user_id, command.hold_id))
        if hold is None:
            return HoldChanged(command.hold_id, None, None)
        if hold.state is HoldState.OPEN:
            self._leave_open(hold, state)
            if hold.request_id:
                self._requests.pop((hold.user_id, hold.request_id), None)
        return HoldChanged(hold.hold_id, hold.state, hold.closed_at)

    def _leave_open(self, hold: Hold, state: HoldState) -> None:
        hold.state = state
        hold.closed_at = self._now
        self._touch(self._account(hold.user_id)).held_micros -= hold.held_micros
        self._mark_changed(hold)

    def _mark_changed(self, hold: Hold) -> None:
        key = (hold.user_id, hold.hold_id)
        if key not in self.new_holds:
            self.changed_holds[key] = hold

    # Entries

    def _record_charge(self, command: RecordCharge) -> ChargeRecorded:
        earlier = self._entries.get((command.user_id, command.event_id))
        if earlier is not None:
            return self._record_again(command, earlier)
        hold = self._holds.get((command.user_id, command.call_id)) if command.call_id else None
        quote, flags = self._price(command)
        status = EntryStatus.APPLIED
        micros = 0
        if command.skip_charge:
            status = EntryStatus.SKIPPED
        elif quote is None:
            status = EntryStatus.UNPRICED
        else:
            micros = charge_micros(command.usage, quote.rates)
        account = self._account(command.user_id)
        if not _in_range(account, -micros):
            return self._reject(command, "the balance would leave its range")
        flags |= _hold_flags(hold, micros)
        entry = self._append(account, Entry(
            user_id=command.user_id, seq=account.seq + 1, event_id=command.event_id, source=EntrySource.CHARGE,
            amount_micros=-micros, balance_after_micros=account.balance_micros - micros, status=status,
            occurred_at=command.occurred_at, booked_at=self._now, scene=command.scene, model=command.model,
            provider=command.provider, usage=command.usage, price_rule_id=quote.rule_id if quote else "",
            price_rule_version=quote.version if quote else 0, rates=quote.rates if quote else None,
            call_id=str(command.call_id or ""), request_id=command.request_id,
            conversation_id=command.conversation_id, flags=flags,
        ))
        account.total_consumed_micros += micros
        if hold is not None:
            self._settle(hold)
        done = RecordStatus.UNPRICED if status is EntryStatus.UNPRICED else RecordStatus.APPLIED
        return ChargeRecorded(done, entry.seq, micros)

    def _settle(self, hold: Hold) -> None:
        """A charge releases its hold. One that expired or was released before is linked, its credit is free already."""
        if hold.state is HoldState.OPEN:
            self._leave_open(hold, HoldState.SETTLED)
        elif hold.state is not HoldState.SETTLED:
            hold.state = HoldState.SETTLED
            self._mark_changed(hold)

    def _price(self, command: RecordCharge) -> tuple[Quote | None, EntryFlag]:
        """The quoted version, at the rates in the books; without a quote, the rule in effect when it happened."""
        if command.quote is None:
            rule = self._prices.match(
                scene=command.scene, provider=command.provider, model=command.model, at=command.occurred_at
            )
            return (rule.quote if rule else None), EntryFlag(0)
        rule = self._prices.version(command.quote.rule_id, command.quote.version)
        if rule is None:
            return None, EntryFlag.QUOTE_MISMATCH
        same = command.quote.rates in (rule.rates, Rates())
        return rule.quote, EntryFlag(0) if same else EntryFlag.QUOTE_MISMATCH

    def _record_again(self, command: RecordCharge, earlier: Entry) -> ChargeRecorded:
        if _identity_of_entry(earlier) == _identity_of_charge(command):
            return ChargeRecorded(RecordStatus.DUPLICATE, earlier.seq, -earlier.amount_micros)
        detail = f"event {command.event_id} is entry {earlier.seq} with other content"
        self.issues.append(ChargeIssue(command.user_id, command.event_id, "CONFLICT", detail, command))
        return ChargeRecorded(RecordStatus.CONFLICT, earlier.seq, detail=detail)

    def _reject(self, command: RecordCharge, detail: str) -> ChargeRecorded:
        self.issues.append(ChargeIssue(command.user_id, command.event_id, "REJECTED", detail, command))
        return ChargeRecorded(RecordStatus.REJECTED, detail=detail)

    def _adjust_balance(self, command: AdjustBalance) -> BalanceAdjusted | Exception:
        account = self._account(command.user_id)
        earlier = self._entries.get((command.user_id, command.idempotency_key))
        if earlier is not None:
            same = (
                earlier.source is EntrySource.ADJUSTMENT and earlier.amount_micros == command.amount_micros
                and earlier.description == command.reason and earlier.reference == command.reference
            )
            if not same:
                return IdempotencyConflict(
                    "the idempotency key was used for another entry of this account", seq=earlier.seq
                )
            return BalanceAdjusted(earlier, copy.copy(account))
        if not _in_range(account, command.amount_micros):
            return AmountOutOfRange("the balance would leave its range")
        entry = self._append(account, Entry(
            user_id=command.user_id, seq=account.seq + 1, event_id=command.idempotency_key,
            source=EntrySource.ADJUSTMENT, amount_micros=command.amount_micros,
            balance_after_micros=account.balance_micros + command.amount_micros, status=EntryStatus.APPLIED,
            occurred_at=self._now, booked_at=self._now, reference=command.reference, description=command.reason,
        ))
        if command.amount_micros > 0:
            account.total_rewarded_micros += command.amount_micros
        else:
            account.total_consumed_micros -= command.amount_micros
        return BalanceAdjusted(entry, copy.copy(account))

    def _append(self, account: Account, draft: Entry) -> Entry:
        entry = replace(draft, entry_hash=entry_hash(account.head_hash, draft))
        self._touch(account)
        account.balance_micros = entry.balance_after_micros
        account.seq = entry.seq
        account.head_hash = entry.entry_hash
        self._entries[(entry.user_id, entry.event_id)] = entry
        self.new_entries.append(entry)
        return entry

    # Accounts

    def _account(self, user_id: str) -> Account:
        return self._accounts.setdefault(user_id, Account(user_id))

    def _touch(self, account: Account) -> Account:
        """Only touched accounts are written: a refused hold makes no account."""
        account.updated_at = self._now
        self._touched.add(account.user_id)
        return account


def _refused_for(earlier: Hold, command: OpenHold) -> HoldRefused:
    """The request has an earlier call: another content, still in flight, or charged."""
    existing = str(earlier.hold_id)
    if earlier.request_fingerprint != command.request_fingerprint:
        return HoldRefused("IDEMPOTENCY_CONFLICT", existing_call_id=existing)
    reason = "REQUEST_IN_FLIGHT" if earlier.state is HoldState.OPEN else "REQUEST_FINISHED"
    return HoldRefused(reason, existing_call_id=existing)


def _in_range(account: Account, change: int) -> bool:
    bounded = (
        account.balance_micros + change,
        account.total_consumed_micros + abs(change),
        account.total_rewarded_micros + abs(change),
    )
    return all(-MOST_MICROS <= value <= MOST_MICROS for value in bounded)


def _hold_flags(hold: Hold | None, micros: int) -> EntryFlag:
    if hold is None:
        return EntryFlag.NO_HOLD
    flags = EntryFlag(0)
    if hold.state is not HoldState.OPEN:
        flags |= EntryFlag.LATE
    if micros > hold.held_micros:
        flags |= EntryFlag.OVERRUN
    return flags


def _identity_of_charge(command: RecordCharge) -> tuple[object, ...]:
    """What makes a charge the same charge: not its price, nor when it was told of, so that a repeat stays a repeat."""
    return (
        EntrySource.CHARGE, str(command.call_id or ""), command.request_id, command.scene, command.provider,
        command.model, command.usage, command.skip_charge,
    )


def _identity_of_entry(entry: Entry) -> tuple[object, ...]:
    return (
        entry.source, entry.call_id, entry.request_id, entry.scene, entry.provider, entry.model, entry.usage,
        entry.status is EntryStatus.SKIPPED,
    )
