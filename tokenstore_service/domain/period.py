"""Periods of limits and budgets, in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Period(IntEnum):
    """How long a limit counts; numbers as on the wire."""

    DAY = 1
    MONTH = 2
    TOTAL = 3


def period_start(period: Period, at: datetime) -> datetime:
    """When the period that `at` lies in began; 1970 for TOTAL."""
    if period is Period.TOTAL:
        return EPOCH
    day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day if period is Period.DAY else day.replace(day=1)


def period_end(period: Period, at: datetime) -> datetime | None:
    """When the next period begins; None for TOTAL."""
    start = period_start(period, at)
    if period is Period.TOTAL:
        return None
    return start + timedelta(days=1) if period is Period.DAY else (start + timedelta(days=32)).replace(day=1)


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `count` in a period."""

    count: int
    period: Period


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the `count` places of a limit; its key is unique, so that races can not pass the limit."""

    user_id: str
    subject: str
    period_start: datetime
    number: int
    holder: str
