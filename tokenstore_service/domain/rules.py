"""Each command's rule, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from servicekit.core.errors import DomainError
from tokenstore_service.domain import budget_rules, charge_rules, credit_rules, hold_rules, order_rules
from tokenstore_service.domain.book import Book
from tokenstore_service.domain.commands import (
    AdjustBalance,
    Answer,
    CloseOrder,
    Command,
    CreateOrder,
    DeleteBudget,
    ExpireHold,
    ExpireLots,
    ExtendHold,
    GrantReward,
    OpenHold,
    PayOrder,
    RecordCharge,
    RefundOrder,
    ReleaseHold,
    Reprice,
    ReverseEntry,
    SetBudget,
    SetOverdraftLimit,
)

RULES: dict[type, Callable[[Book, Any], Answer]] = {
    OpenHold: hold_rules.open_hold,
    ExtendHold: hold_rules.extend_hold,
    ReleaseHold: hold_rules.release_hold,
    ExpireHold: hold_rules.expire_hold,
    RecordCharge: charge_rules.record_charge,
    Reprice: charge_rules.reprice,
    AdjustBalance: credit_rules.adjust_balance,
    ReverseEntry: credit_rules.reverse_entry,
    GrantReward: credit_rules.grant_reward,
    ExpireLots: credit_rules.expire_lots,
    SetOverdraftLimit: credit_rules.set_overdraft_limit,
    CreateOrder: order_rules.create_order,
    PayOrder: order_rules.pay_order,
    CloseOrder: order_rules.close_order,
    RefundOrder: order_rules.refund_order,
    SetBudget: budget_rules.set_budget,
    DeleteBudget: budget_rules.delete_budget,
}


def apply(book: Book, command: Command) -> Answer | DomainError:
    """The answer, or the error that only this command's caller is told. Nothing is half applied: a rule raises before
    it changes anything."""
    try:
        return RULES[type(command)](book, command)
    except DomainError as error:
        return error
