"""What an operator may choose about the books."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Policy:
    """`lot_grace`: for how long a lot that expired reopens when credit goes back to it; zero = the credit becomes a new
    lot without expiry, because an account must not lose what it is given back before it could use it.
    `credit_late_payments`: a payment of a closed order is credited; otherwise it is kept and flagged for refund.
    `refund_spent`: what was spent may be refunded down to the overdraft limit.
    `low_balances`: thresholds in micro-credits, highest first; `rise_percent`: how far above a threshold the balance
    must rise before falling below it is told again.
    `announce_all`: every change of a balance is told, not only those that matter.
    """

    lot_grace: timedelta = timedelta(0)
    credit_late_payments: bool = True
    refund_spent: bool = False
    low_balances: tuple[int, ...] = ()
    rise_percent: int = 10
    announce: bool = False
    announce_all: bool = False


DEFAULT_POLICY = Policy()
