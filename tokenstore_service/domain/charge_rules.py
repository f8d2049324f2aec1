"""Charges: facts that are booked once, in full, whatever became of their hold (I4, I5, I8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

from metering.charge import charge_micros
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, repriced_event, snapshot
from tokenstore_service.domain.commands import (
    Booked,
    ChargeIssue,
    ChargeRecorded,
    IssueKind,
    RecordCharge,
    RecordStatus,
    Reprice,
    Units,
)
from tokenstore_service.domain.correction import corrected_to_text, correction_event
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource, EntryStatus
from tokenstore_service.domain.errors import NoPrice, TransactionNotFound
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.hold_rules import leave_open
from tokenstore_service.domain.lot import LotPriority, uses_from_text
from tokenstore_service.domain.pricing import Priced, price_charge
from tokenstore_service.domain.units import amount_from_text, amount_to_text


def record_charge(book: Book, command: RecordCharge) -> ChargeRecorded:
    if command.corrects:
        first = book.entries.get((command.user_id, command.corrects))
        if first is not None:
            return _correct(book, command, first)
        if command.event_id != command.corrects:
            return _reject(book, command, "there is no charge of this call to correct")
    earlier = book.entries.get((command.user_id, command.event_id))
    if earlier is not None:
        return _record_again(book, command, earlier)
    priced = book.priced.get(id(command)) or price_charge(command, book.prices)
    hold = book.holds.get((command.user_id, command.call_id)) if command.call_id else None
    account = book.account(command.user_id)
    if not book.in_range(account, -priced.micros):
        return _reject(book, command, "the balance would leave its range")
    entry = _book(book, account, command, priced, _hold_flags(hold, priced, command))
    _spend_budgets(book, command, hold, priced.micros)
    if hold is not None:
        _settle(book, hold)
    _notice(book, command, entry, hold)
    status = RecordStatus.UNPRICED if entry.status is EntryStatus.UNPRICED else RecordStatus.APPLIED
    return ChargeRecorded(status, entry.seq, priced.micros)


def _book(book: Book, account: Account, command: RecordCharge, priced: Priced, flags: EntryFlag) -> Entry:
    quote, units, micros = priced.quote, command.units, priced.micros
    lots = book.take_lots(account, micros)
    return book.post(account, Entry(
        user_id=account.user_id, seq=account.seq + 1, event_id=command.event_id, source=EntrySource.CHARGE,
        amount_micros=-micros, balance_after_micros=account.balance_micros - micros, status=priced.status,
        occurred_at=command.occurred_at, booked_at=book.moment(account), lots=lots, scene=command.scene,
        model=command.model, provider=command.provider, usage=command.usage,
        price_rule_id=quote.rule_id if quote else "", price_rule_version=quote.version if quote else 0,
        rates=quote.rates if quote and units is None else None, call_id=str(command.call_id or ""),
        request_id=command.request_id, conversation_id=command.conversation_id,
        flags=priced.flags | flags if priced.flags else flags,
        unit_type=units.unit_type if units else "", unit_amount=amount_to_text(units.amount) if units else "",
        unit_pico=priced.unit_pico, details=command.details,
    ))


def _correct(book: Book, command: RecordCharge, first: Entry) -> ChargeRecorded:
    """Books what the corrected usage costs more or less, at the price of the first entry, which stays as it is."""
    event_id = correction_event(first.event_id)
    earlier = book.entries.get((command.user_id, event_id))
    if earlier is not None or first.usage == command.usage:
        done = earlier or first
        if done.usage == command.usage:
            return ChargeRecorded(RecordStatus.DUPLICATE, done.seq, -done.amount_micros)
        detail = f"the charge was corrected before by entry {done.seq}, with other usage"
        book.issues.append(
            ChargeIssue(command.user_id, command.event_id, IssueKind.CONFLICT, detail, done.seq, command)
        )
        return ChargeRecorded(RecordStatus.CONFLICT, done.seq, detail=detail)
    if first.source is not EntrySource.CHARGE or first.usage is None or command.usage is None:
        return _reject(book, command, "the entry of this call is no charge for tokens")
    if first.status is EntryStatus.UNPRICED:
        return _reject(book, command, "the charge has no price yet: price it, then retry the correction")
    account = book.account(command.user_id)
    micros = charge_micros(command.usage, first.rates) if first.rates and first.status is EntryStatus.APPLIED else 0
    change = -first.amount_micros - micros
    if not book.in_range(account, change):
        return _reject(book, command, "the balance would leave its range")
    fields: dict[str, Any] = {
        "source": EntrySource.CHARGE, "event_id": event_id, "status": first.status, "occurred_at": first.occurred_at,
        "scene": first.scene, "model": first.model, "provider": first.provider, "usage": command.usage,
        "price_rule_id": first.price_rule_id, "price_rule_version": first.price_rule_version, "rates": first.rates,
        "call_id": first.call_id, "request_id": first.request_id, "conversation_id": first.conversation_id,
        "flags": EntryFlag.CORRECTED, "details": corrected_to_text(first), "reference": first.event_id,
    }
    if change < 0:
        entry = book.book_expense(account, -change, **fields)
    else:
        uses = uses_from_text(first.lots)
        lot = book.lot(account.user_id, uses[0][0]) if uses else None
        entry = book.book_income(
            account, change, lot_source=lot.source if lot else EntrySource.ADJUSTMENT,
            lot_priority=lot.priority if lot else LotPriority.ADJUSTMENT, give_back=uses, **fields,
        )
    hold = book.holds.get((command.user_id, command.call_id)) if command.call_id else None
    _spend_budgets(book, command, hold, -change)
    return ChargeRecorded(RecordStatus.APPLIED, entry.seq, -change)


def _hold_flags(hold: Hold | None, priced: Priced, command: RecordCharge) -> EntryFlag:
    if hold is None:
        # A usage event of another service never has a hold.
        return EntryFlag(0) if command.units is not None else EntryFlag.NO_HOLD
    flags = EntryFlag(0)
    if hold.state is not HoldState.OPEN:
        flags |= EntryFlag.LATE
    if priced.micros > hold.held_micros:
        flags |= EntryFlag.OVERRUN
    return flags


def _settle(book: Book, hold: Hold) -> None:
    """A charge releases its hold. One that expired or was released before is linked, its credit is free already."""
    if hold.state is HoldState.OPEN:
        leave_open(book, hold, HoldState.SETTLED)
    elif hold.state is not HoldState.SETTLED:
        hold.state = HoldState.SETTLED
        book.mark_hold(hold)


def _spend_budgets(book: Book, command: RecordCharge, hold: Hold | None, micros: int) -> None:
    labels = hold.labels if hold is not None else command.labels
    for budget in book.budgets.get(command.user_id, {}).values():
        if budget.matches(labels):
            budget.spent_micros += micros
            book.mark_budget(budget)


def _notice(book: Book, command: RecordCharge, entry: Entry, hold: Hold | None) -> None:
    """What is booked, but worth a look."""
    def note(kind: IssueKind, detail: str) -> None:
        book.issues.append(ChargeIssue(command.user_id, command.event_id, kind, detail, entry.seq, command))

    if entry.status is EntryStatus.UNPRICED:
        note(IssueKind.UNPRICED, "no price rule matches; booked at 0 until one does")
    if hold is None:
        return
    if EntryFlag.OVERRUN in entry.flags:
        note(IssueKind.OVERRUN, f"charged {-entry.amount_micros}, {hold.held_micros} was held; booked in full")
    if EntryFlag.LATE in entry.flags:
        note(IssueKind.LATE, "its hold had ended before; booked in full")


def _record_again(book: Book, command: RecordCharge, earlier: Entry) -> ChargeRecorded:
    if _identity_of_entry(earlier) == _identity_of_charge(command):
        return ChargeRecorded(RecordStatus.DUPLICATE, earlier.seq, -earlier.amount_micros)
    detail = f"event {command.event_id} is entry {earlier.seq} with other content"
    book.issues.append(
        ChargeIssue(command.user_id, command.event_id, IssueKind.CONFLICT, detail, earlier.seq, command)
    )
    return ChargeRecorded(RecordStatus.CONFLICT, earlier.seq, detail=detail)


def _reject(book: Book, command: RecordCharge, detail: str) -> ChargeRecorded:
    book.issues.append(ChargeIssue(command.user_id, command.event_id, IssueKind.REJECTED, detail, 0, command))
    return ChargeRecorded(RecordStatus.REJECTED, detail=detail)


def _identity_of_charge(command: RecordCharge) -> tuple[object, ...]:
    """What makes a charge the same charge: not its price, nor when it was told of, so that a repeat stays a repeat."""
    units = command.units
    return (
        EntrySource.CHARGE, str(command.call_id or ""), command.request_id, command.scene, command.provider,
        command.model, command.usage, command.skip_charge, units.unit_type if units else "",
        amount_to_text(units.amount) if units else "",
    )


def _identity_of_entry(entry: Entry) -> tuple[object, ...]:
    return (
        entry.source, entry.call_id, entry.request_id, entry.scene, entry.provider, entry.model, entry.usage,
        entry.status is EntryStatus.SKIPPED, entry.unit_type, entry.unit_amount,
    )


def reprice(book: Book, command: Reprice) -> Booked:
    """An entry of its own for the price, priced by the rules as of when it happened; the first entry stays as it is."""
    first = book.entries.get((command.user_id, command.event_id))
    if first is None or first.source is not EntrySource.CHARGE:
        raise TransactionNotFound("there is no such charge in this account")
    account = book.account(command.user_id)
    done = book.entries.get((command.user_id, repriced_event(command.event_id)))
    if done is not None:
        return Booked(done, snapshot(account))
    if first.status is not EntryStatus.UNPRICED:
        return Booked(first, snapshot(account))
    charge = charge_of_entry(first)
    priced = price_charge(charge, book.prices)
    if priced.status is not EntryStatus.APPLIED:
        raise NoPrice(
            f"no price rule matches scene {first.scene!r}, provider {first.provider!r}, model {first.model!r}"
        )
    book.require_range(account, -priced.micros)
    again = replace(charge, event_id=repriced_event(command.event_id))
    entry = _book(book, account, again, priced, EntryFlag.REPRICED)
    return Booked(entry, snapshot(account))


def charge_of_entry(entry: Entry) -> RecordCharge:
    """The charge that an entry was made of, without its quote."""
    units = Units(entry.unit_type, amount_from_text(entry.unit_amount)) if entry.unit_type else None
    return RecordCharge(
        event_id=entry.event_id, user_id=entry.user_id, call_id=UUID(entry.call_id) if entry.call_id else None,
        request_id=entry.request_id, scene=entry.scene, provider=entry.provider, model=entry.model, usage=entry.usage,
        quote=None, occurred_at=entry.occurred_at, conversation_id=entry.conversation_id, units=units,
        details=entry.details,
    )
