"""Reward rules: what an event of another service earns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tokenstore_service.domain.period import Limit


@dataclass(frozen=True, slots=True)
class RewardRule:
    """One version of the rule for a source; it never changes. A rule that is not active books 0, once per event."""

    source: str
    version: int
    name: str
    amount_micros: int
    is_active: bool
    limit: Limit | None
    validity_days: int
    description: str
    created_at: datetime
