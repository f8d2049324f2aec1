"""Budgets: made, changed, removed; what they cap is decided in hold_rules."""

from __future__ import annotations

import copy

from tokenstore_service.domain.book import Book
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.commands import BudgetChanged, DeleteBudget, SetBudget
from tokenstore_service.domain.errors import BudgetNotFound
from tokenstore_service.domain.hold import HoldState
from tokenstore_service.domain.period import period_start


def set_budget(book: Book, command: SetBudget) -> BudgetChanged:
    """One budget for each user, label and period: setting it again changes its limit and keeps what was counted."""
    account = book.account(command.user_id)
    budgets = book.budgets.setdefault(command.user_id, {})
    known = next((
        each for each in budgets.values()
        if (each.label_key, each.label_value, each.period)
        == (command.label_key, command.label_value, command.period)
    ), None)
    if known is not None:
        if known.limit_micros != command.limit_micros:
            known.limit_micros = command.limit_micros
            book.mark_budget(known)
        return BudgetChanged(copy.copy(known))
    budget = Budget(
        user_id=command.user_id, budget_id=command.budget_id, label_key=command.label_key,
        label_value=command.label_value, period=command.period, limit_micros=command.limit_micros, spent_micros=0,
        held_micros=0, period_start=period_start(command.period, book.now), created_at=book.now, updated_at=book.now,
    )
    for hold in book.holds.values():  # calls that run already count in it too
        if hold.user_id == command.user_id and hold.state is HoldState.OPEN and budget.matches(hold.labels):
            budget.held_micros += hold.held_micros
            hold.budget_ids = (*hold.budget_ids, budget.budget_id)
            book.mark_hold(hold)
    budgets[budget.budget_id] = budget
    book.new_budgets[budget.budget_id] = budget
    book.touch(account).has_budgets = True
    book.widely_changed.add(command.user_id)
    return BudgetChanged(copy.copy(budget))


def delete_budget(book: Book, command: DeleteBudget) -> BudgetChanged:
    budgets = book.budgets.get(command.user_id, {})
    budget = budgets.pop(command.budget_id, None)
    if budget is None:
        raise BudgetNotFound("there is no such budget")
    book.new_budgets.pop(budget.budget_id, None)
    book.changed_budgets.pop(budget.budget_id, None)
    book.deleted_budgets.append(budget)
    account = book.touch(book.account(command.user_id))
    account.has_budgets = bool(budgets)
    book.widely_changed.add(command.user_id)
    return BudgetChanged(budget)
