"""Corrections, reversals, rewards, expiry: entries that are neither sales nor charges."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from servicekit.core.errors import IdempotencyConflict
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, limited_slot, snapshot
from tokenstore_service.domain.commands import (
    AccountChanged,
    AdjustBalance,
    Booked,
    ExpireLots,
    GrantReward,
    ReverseEntry,
    SetOverdraftLimit,
)
from tokenstore_service.domain.entry import Entry, EntrySource, EntryStatus
from tokenstore_service.domain.errors import InsufficientCredit, TransactionNotFound, TransactionNotReversible
from tokenstore_service.domain.lot import LotPriority, uses_from_text

REVERSIBLE = {EntrySource.CHARGE, EntrySource.REWARD, EntrySource.ADJUSTMENT, EntrySource.EXPIRY}


def require_free(account: Account, micros: int, *, allow_overdraft: bool) -> None:
    """What is taken back must not be held by a running call. Raises InsufficientCredit."""
    free = account.available_micros + (account.overdraft_limit_micros if allow_overdraft else 0)
    if micros > free:
        raise InsufficientCredit(
            "the account does not have so much free credit", user_id=account.user_id, needed_micros=micros,
            available_micros=account.available_micros,
        )


def _conflict(earlier: Entry) -> IdempotencyConflict:
    return IdempotencyConflict("the idempotency key was used for another entry of this account", seq=earlier.seq)


def adjust_balance(book: Book, command: AdjustBalance) -> Booked:
    account = book.account(command.user_id)
    earlier = book.entries.get((command.user_id, command.idempotency_key))
    if earlier is not None:
        same = (
            earlier.source is EntrySource.ADJUSTMENT and earlier.amount_micros == command.amount_micros
            and earlier.description == command.reason and earlier.reference == command.reference
            and earlier.lot_expires_at in (command.expires_at, None)
        )
        if not same:
            raise _conflict(earlier)
        return Booked(earlier, snapshot(account))
    book.require_range(account, command.amount_micros)
    fields: dict[str, Any] = {
        "source": EntrySource.ADJUSTMENT, "event_id": command.idempotency_key, "reference": command.reference,
        "description": command.reason, "actor": command.actor,
    }
    if command.amount_micros < 0:
        entry = book.book_expense(account, -command.amount_micros, **fields)
    else:
        entry = book.book_income(
            account, command.amount_micros, lot_source=EntrySource.ADJUSTMENT, lot_priority=LotPriority.ADJUSTMENT,
            lot_expires_at=command.expires_at, **fields,
        )
    return Booked(entry, snapshot(account))


def reverse_entry(book: Book, command: ReverseEntry) -> Booked:
    """Once per entry. What a charge took goes back to its lots; what an income gave is taken from its lot first."""
    account = book.account(command.user_id)
    key = (command.user_id, command.seq)
    earlier = book.entries.get((command.user_id, command.idempotency_key))
    if earlier is not None:
        if earlier.reverses_seq != command.seq or earlier.description != command.reason:
            raise _conflict(earlier)
        return Booked(earlier, snapshot(account))
    of_account = [entry for entry in book.entries.values() if entry.user_id == command.user_id]
    wrong = next((entry for entry in of_account if entry.seq == command.seq), None)
    if wrong is None:
        raise TransactionNotFound("there is no such entry in this account")
    reversal = next((entry for entry in of_account if entry.reverses_seq == command.seq), None)
    if reversal is not None:
        raise TransactionNotReversible("the entry was reversed before", seq=reversal.seq, reversed_seq=key[1])
    if wrong.source not in REVERSIBLE or wrong.amount_micros == 0:
        raise TransactionNotReversible(
            "only charges, rewards, adjustments and expiries of an amount can be reversed; orders by RefundOrder"
        )
    amount = -wrong.amount_micros
    book.require_range(account, amount)
    is_charge = wrong.source is EntrySource.CHARGE
    fields: dict[str, Any] = {
        "source": EntrySource.REVERSAL, "event_id": command.idempotency_key, "description": command.reason,
        "actor": command.actor, "reverses_seq": wrong.seq, "reference": wrong.event_id, "order_id": wrong.order_id,
        "scene": wrong.scene if is_charge else "", "model": wrong.model if is_charge else "",
        "provider": wrong.provider if is_charge else "", "call_id": wrong.call_id,
        "conversation_id": wrong.conversation_id, "occurred_at": wrong.occurred_at if is_charge else None,
    }
    if amount < 0:
        if not command.allow_negative:
            require_free(account, -amount, allow_overdraft=True)
        entry = book.book_expense(account, -amount, first=(wrong.seq,), **fields)
    else:
        uses = uses_from_text(wrong.lots)
        lot = book.lot(account.user_id, uses[0][0]) if uses else None
        entry = book.book_income(
            account, amount, lot_source=lot.source if lot else EntrySource.ADJUSTMENT,
            lot_priority=lot.priority if lot else LotPriority.ADJUSTMENT, give_back=uses, **fields,
        )
    return Booked(entry, snapshot(account))


def grant_reward(book: Book, command: GrantReward) -> Booked:
    """Once per event. A rule that is off, or a limit that is reached, books 0, so that the event stays decided."""
    rule = command.rule
    account = book.account(command.user_id)
    earlier = book.entries.get((command.user_id, command.event_id))
    if earlier is not None:
        same = (
            earlier.source is EntrySource.REWARD and earlier.scene == rule.source
            and earlier.reference == command.source_ref_id
        )
        if not same:
            raise _conflict(earlier)
        return Booked(earlier, snapshot(account))
    fields: dict[str, Any] = {
        "source": EntrySource.REWARD, "event_id": command.event_id, "reference": command.source_ref_id,
        "actor": command.actor, "scene": rule.source,
    }
    slot, limit = limited_slot(command, book.now), rule.limit
    book.require_range(account, rule.amount_micros)
    if not rule.is_active or rule.amount_micros == 0:
        refusal = f"{rule.source} v{rule.version} is off"
    elif slot is not None and limit is not None and not book.take_slots(slot, 1, limit.count, command.event_id):
        refusal = f"{rule.source} v{rule.version}: limit of {limit.count} reached"
    else:
        expires_at = book.now + timedelta(days=rule.validity_days) if rule.validity_days else None
        entry = book.book_income(
            account, rule.amount_micros, lot_source=EntrySource.REWARD, lot_priority=LotPriority.REWARD,
            lot_expires_at=expires_at, description=f"{rule.name} ({rule.source} v{rule.version})", **fields,
        )
        return Booked(entry, snapshot(account))
    entry = book.book_expense(account, 0, status=EntryStatus.SKIPPED, description=refusal, **fields)
    return Booked(entry, snapshot(account))


def expire_lots(book: Book, command: ExpireLots) -> AccountChanged:
    """`account` books what is due. A lot that is empty, or held, only moves the account's next look."""
    account = book.account(command.user_id)
    if account.next_expiry_at is not None:
        book.touch(account)
    return AccountChanged(snapshot(account))


def set_overdraft_limit(book: Book, command: SetOverdraftLimit) -> AccountChanged:
    account = book.touch(book.account(command.user_id))
    book.widely_changed.add(command.user_id)
    account.overdraft_limit_micros = command.overdraft_limit_micros
    return AccountChanged(snapshot(account))
