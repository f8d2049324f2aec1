"""A credit account: what is derived from its entries and open holds, kept beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

GENESIS_HASH = bytes(32)
MOST_MICROS = 9 * 10**18
"""Balances stay within +-9 x 10^12 credits, inside int64."""


@dataclass(slots=True)
class Account:
    """An account as of its entry `seq`; micro-credits. `head_hash` is the hash of that entry."""

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

    @property
    def available_micros(self) -> int:
        return self.balance_micros - self.held_micros

    @property
    def holdable_micros(self) -> int:
        """What new holds may take (I3)."""
        return self.available_micros + self.overdraft_limit_micros
