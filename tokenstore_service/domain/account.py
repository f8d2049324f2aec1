"""A credit account: what is derived from its entries and open holds, kept beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

GENESIS_HASH = bytes(32)
MOST_MICROS = 9 * 10**18
"""Balances stay within +-9 x 10^12 credits, inside int64."""


@dataclass(slots=True)
class Account:
    """An account as of its entry `seq`; micro-credits. `head_hash` is the hash of that entry.

    `head_lot` is the lot that is spent next, with what remains of it, so that a charge that fits into it touches no
    lot's row: that row lags behind and is brought up to date when another lot takes its place.
    `version` counts every change, holds included; a snapshot with a lower one is older (I12).
    """

    user_id: str
    balance_micros: int = 0
    held_micros: int = 0
    overdraft_limit_micros: int = 0
    total_recharged_micros: int = 0
    total_rewarded_micros: int = 0
    total_consumed_micros: int = 0
    seq: int = 0
    head_hash: bytes = field(default=GENESIS_HASH, repr=False)
    updated_at: datetime | None = None
    version: int = 0
    head_lot: int = 0
    head_lot_micros: int = 0
    next_expiry_at: datetime | None = None
    has_budgets: bool = False
    low_level: int = 0
    """How many of the low-balance thresholds the balance is under."""

    @property
    def available_micros(self) -> int:
        return self.balance_micros - self.held_micros

    @property
    def holdable_micros(self) -> int:
        """What new holds may take (I3)."""
        return self.available_micros + self.overdraft_limit_micros
