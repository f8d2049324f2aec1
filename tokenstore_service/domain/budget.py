"""Budgets: spend caps beyond the balance, per user or per user and label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from tokenstore_service.domain.period import Period, period_end, period_start


@dataclass(slots=True)
class Budget:
    """A cap on what may be spent in a period (UTC), counted from when it was set. An empty label key = the whole user.

    What open holds set aside counts as spent until they end; `spent_micros` is what was charged in the period that
    began at `period_start`. A charge above its hold is booked all the same (I4), so an overrun can pass a cap.
    """

    user_id: str
    budget_id: str
    label_key: str
    label_value: str
    period: Period
    limit_micros: int
    spent_micros: int
    held_micros: int
    period_start: datetime
    created_at: datetime
    updated_at: datetime

    def matches(self, labels: Mapping[str, str]) -> bool:
        return not self.label_key or labels.get(self.label_key) == self.label_value

    def roll(self, now: datetime) -> None:
        """Begins the period that `now` lies in, if another one was counted."""
        start = period_start(self.period, now)
        if start > self.period_start:
            self.period_start = start
            self.spent_micros = 0

    @property
    def left_micros(self) -> int:
        return self.limit_micros - self.spent_micros - self.held_micros

    def resets_at(self, now: datetime) -> datetime | None:
        return period_end(self.period, now)


def binding_budget(budgets: Iterable[Budget]) -> Budget | None:
    """The one that leaves the least."""
    return min(budgets, key=lambda budget: budget.left_micros, default=None)
