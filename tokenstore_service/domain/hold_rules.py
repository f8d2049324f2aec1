"""Holds: granted if they fit, extended, released, expired; each leaves OPEN once (I2, I3)."""

from __future__ import annotations

import copy

from metering.charge import Quote, Rates, dearest
from tokenstore_service.domain.account import MOST_MICROS, Account
from tokenstore_service.domain.book import Book
from tokenstore_service.domain.budget import Budget, binding_budget
from tokenstore_service.domain.commands import (
    ExpireHold,
    ExtendHold,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    OpenHold,
    ReleaseHold,
)
from tokenstore_service.domain.hold import Hold, HoldSize, HoldState, size_hold


def open_hold(book: Book, command: OpenHold) -> HoldGranted | HoldRefused:
    known = book.holds.get((command.user_id, command.hold_id))
    if known is not None:
        return _open_again(book, command, known)
    earlier = book.requests.get((command.user_id, command.request_id)) if command.request_id else None
    if earlier is not None and earlier.state in (HoldState.OPEN, HoldState.SETTLED):
        return _refused_for(earlier, command)
    account = book.account(command.user_id)
    budgets = [each for each in book.budgets.get(command.user_id, {}).values() if each.matches(command.labels)]
    rule = book.prices.match(scene=command.scene, provider=command.provider, model=command.model, at=book.now)
    others = _other_quotes(book, command)
    rates = Rates() if rule is None else rule.rates
    if others:
        rates = dearest([rates, *(quote.rates for quote in others.values())])
    if command.skip_charge:
        rates = Rates()
    holdable = MOST_MICROS
    if not command.skip_charge:
        holdable = min([_holdable(book, account), *(budget.left_micros for budget in budgets)])
    size = size_hold(
        holdable_micros=holdable, rates=rates, input_tokens=command.input_tokens,
        max_output_tokens=command.max_output_tokens, min_output_tokens=command.min_output_tokens,
    )
    if not size.granted:
        return _too_little(book, account, budgets, size)
    hold = Hold(
        user_id=command.user_id, hold_id=command.hold_id, request_id=command.request_id, scene=command.scene,
        provider=command.provider, model=command.model, held_micros=size.micros, input_tokens=command.input_tokens,
        max_output_tokens=size.output_tokens, asked_output_tokens=command.max_output_tokens,
        price_rule_id=rule.rule_id if rule else "", price_rule_version=rule.version if rule else 0,
        request_fingerprint=command.request_fingerprint, skip_charge=command.skip_charge, origin=command.origin,
        state=HoldState.OPEN, opened_at=book.now, expires_at=book.now + command.ttl, labels=command.labels,
        budget_ids=tuple(budget.budget_id for budget in budgets),
    )
    book.touch(account).held_micros += size.micros
    for budget in budgets:
        budget.held_micros += size.micros
        book.mark_budget(budget)
    book.remember_hold(hold)
    book.new_holds[(hold.user_id, hold.hold_id)] = hold
    return HoldGranted(copy.copy(hold), rule.quote if rule else None, others)


def _other_quotes(book: Book, command: OpenHold) -> dict[str, Quote]:
    found: dict[str, Quote] = {}
    for provider in command.other_providers:
        rule = book.prices.match(scene=command.scene, provider=provider, model=command.model, at=book.now)
        if rule is not None:
            found[provider] = rule.quote
    return found


def _holdable(book: Book, account: Account) -> int:
    """What new holds may take: credit whose time is over serves only the calls that hold it already."""
    due = book.due_micros(account)
    return account.balance_micros - max(account.held_micros, due) + account.overdraft_limit_micros


def _too_little(book: Book, account: Account, budgets: list[Budget], size: HoldSize) -> HoldRefused:
    available = _holdable(book, account)
    budget = binding_budget(budgets)
    if budget is None or available <= budget.left_micros:
        return HoldRefused(
            "INSUFFICIENT_CREDIT", needed_micros=size.micros,
            available_micros=available - account.overdraft_limit_micros,
        )
    return HoldRefused(
        "BUDGET_EXCEEDED", needed_micros=size.micros, available_micros=budget.left_micros, budget=copy.copy(budget),
        resets_at=budget.resets_at(book.now),
    )


def _open_again(book: Book, command: OpenHold, known: Hold) -> HoldGranted | HoldRefused:
    """The same call asks again, e.g. because it never heard the answer."""
    same = (
        known.request_id == command.request_id and known.scene == command.scene
        and known.provider == command.provider and known.model == command.model
        and known.input_tokens == command.input_tokens and known.asked_output_tokens == command.max_output_tokens
        and known.request_fingerprint == command.request_fingerprint and known.skip_charge == command.skip_charge
    )
    if not same or known.state is not HoldState.OPEN:
        return HoldRefused("IDEMPOTENCY_CONFLICT", existing_call_id=str(known.hold_id))
    rule = book.prices.version(known.price_rule_id, known.price_rule_version)
    return HoldGranted(copy.copy(known), rule.quote if rule else None, _other_quotes(book, command))


def _refused_for(earlier: Hold, command: OpenHold) -> HoldRefused:
    """The request has an earlier call: another content, still in flight, or charged."""
    existing = str(earlier.hold_id)
    if earlier.request_fingerprint != command.request_fingerprint:
        return HoldRefused("IDEMPOTENCY_CONFLICT", existing_call_id=existing)
    reason = "REQUEST_IN_FLIGHT" if earlier.state is HoldState.OPEN else "REQUEST_FINISHED"
    return HoldRefused(reason, existing_call_id=existing)


def extend_hold(book: Book, command: ExtendHold) -> HoldChanged:
    hold = book.holds.get((command.user_id, command.hold_id))
    if hold is None:
        return HoldChanged(command.hold_id, None, None)
    if hold.state is HoldState.OPEN and book.now + command.ttl > hold.expires_at:
        hold.expires_at = book.now + command.ttl
        book.mark_hold(hold)
    return HoldChanged(hold.hold_id, hold.state, hold.closed_at or hold.expires_at)


def release_hold(book: Book, command: ReleaseHold) -> HoldChanged:
    return _close(book, command, HoldState.RELEASED)


def expire_hold(book: Book, command: ExpireHold) -> HoldChanged:
    hold = book.holds.get((command.user_id, command.hold_id))
    if hold is not None and hold.state is HoldState.OPEN and hold.expires_at > book.now:
        return HoldChanged(hold.hold_id, hold.state, hold.expires_at)  # extended meanwhile
    return _close(book, command, HoldState.EXPIRED)


def _close(book: Book, command: ReleaseHold | ExpireHold, state: HoldState) -> HoldChanged:
    hold = book.holds.get((command.user_id, command.hold_id))
    if hold is None:
        return HoldChanged(command.hold_id, None, None)
    if hold.state is HoldState.OPEN:
        leave_open(book, hold, state)
        if hold.request_id:
            book.requests.pop((hold.user_id, hold.request_id), None)
    return HoldChanged(hold.hold_id, hold.state, hold.closed_at)


def leave_open(book: Book, hold: Hold, state: HoldState) -> None:
    """The one way out of OPEN: the credit is free again, also in the budgets that counted it."""
    hold.state = state
    hold.closed_at = book.now
    book.touch(book.account(hold.user_id)).held_micros -= hold.held_micros
    for budget_id in hold.budget_ids:
        budget = book.budgets.get(hold.user_id, {}).get(budget_id)
        if budget is not None:
            budget.held_micros -= hold.held_micros
            book.mark_budget(budget)
    book.mark_hold(hold)
