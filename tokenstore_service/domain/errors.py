"""What can be wrong with a request to the books."""

from __future__ import annotations

from servicekit.core.errors import DomainError


class HoldNotFound(DomainError):
    """There is no such hold, or it is another user's."""

    reason = "HOLD_NOT_FOUND"


class TransactionNotFound(DomainError):
    """There is no such ledger entry, or it is another user's."""

    reason = "TRANSACTION_NOT_FOUND"


class TransactionNotReversible(DomainError):
    """The entry was reversed before, or is of a kind that has another way back."""

    reason = "TRANSACTION_NOT_REVERSIBLE"


class PriceRuleNotFound(DomainError):
    """There is no such price rule or version."""

    reason = "PRICE_RULE_NOT_FOUND"


class PriceRuleOverlap(DomainError):
    """Another active rule matches the same calls at the same time with the same priority."""

    reason = "PRICE_RULE_OVERLAP"


class NoPrice(DomainError):
    """No price rule matches."""

    reason = "NO_PRICE"


class AmountOutOfRange(DomainError):
    """An amount, a rate or a balance would leave the range of its unit."""

    reason = "AMOUNT_OUT_OF_RANGE"


class InsufficientCredit(DomainError):
    """The account does not have what is to be taken."""

    reason = "INSUFFICIENT_CREDIT"


class ProductNotFound(DomainError):
    """There is no such product."""

    reason = "PRODUCT_NOT_FOUND"


class ProductNotAvailable(DomainError):
    """The product is no longer sold."""

    reason = "PRODUCT_NOT_AVAILABLE"


class PurchaseLimitReached(DomainError):
    """The user has bought as many of the product as the period allows."""

    reason = "PURCHASE_LIMIT_REACHED"


class OrderNotFound(DomainError):
    """There is no such order, or it is another user's."""

    reason = "ORDER_NOT_FOUND"


class OrderNotPayable(DomainError):
    """The order is in a state in which this can not be done."""

    reason = "ORDER_NOT_PAYABLE"


class OrderNotRefundable(DomainError):
    """Not so much of the order can be given back."""

    reason = "ORDER_NOT_REFUNDABLE"


class PaymentRefused(DomainError):
    """The confirmation is not one of a known provider for this order."""

    reason = "PAYMENT_REFUSED"


class RewardRuleNotFound(DomainError):
    """There is no reward for this source."""

    reason = "REWARD_RULE_NOT_FOUND"


class BudgetNotFound(DomainError):
    """There is no such budget."""

    reason = "BUDGET_NOT_FOUND"


class ChargeIssueNotFound(DomainError):
    """There is no such issue."""

    reason = "CHARGE_ISSUE_NOT_FOUND"


class ChargeIssueNotResolvable(DomainError):
    """The issue is closed, or this does not help it."""

    reason = "CHARGE_ISSUE_NOT_RESOLVABLE"
