"""What can be wrong with a request to the books."""

from __future__ import annotations

from servicekit.core.errors import DomainError


class HoldNotFound(DomainError):
    """There is no such hold, or it is another user's."""

    reason = "HOLD_NOT_FOUND"


class TransactionNotFound(DomainError):
    """There is no such ledger entry, or it is another user's."""

    reason = "TRANSACTION_NOT_FOUND"


class PriceRuleNotFound(DomainError):
    """There is no such price rule or version."""

    reason = "PRICE_RULE_NOT_FOUND"


class NoPrice(DomainError):
    """No price rule matches."""

    reason = "NO_PRICE"


class AmountOutOfRange(DomainError):
    """An amount, a rate or a balance would leave the range of its unit."""

    reason = "AMOUNT_OUT_OF_RANGE"
