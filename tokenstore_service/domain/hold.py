"""Holds: credit set aside for running calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from uuid import UUID

from metering.charge import Rates, affordable_output_tokens, bound_micros


class HoldState(IntEnum):
    """Where a hold stands; it leaves OPEN exactly once (I2). Numbers as on the wire."""

    OPEN = 1
    SETTLED = 2
    RELEASED = 3
    EXPIRED = 4


@dataclass(slots=True)
class Hold:
    """A hold; micro-credits. Without a price rule nothing is set aside and the usage is priced later."""

    user_id: str
    hold_id: UUID
    request_id: str
    scene: str
    provider: str
    model: str
    held_micros: int
    input_tokens: int
    max_output_tokens: int
    asked_output_tokens: int
    price_rule_id: str
    price_rule_version: int
    request_fingerprint: bytes
    skip_charge: bool
    origin: str
    state: HoldState
    opened_at: datetime
    expires_at: datetime
    closed_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    budget_ids: tuple[str, ...] = ()
    """The budgets whose held_micros this hold counts in."""


@dataclass(frozen=True, slots=True)
class HoldSize:
    """What a hold would be: granted with `output_tokens`, or not, with what would have been needed."""

    granted: bool
    output_tokens: int
    micros: int


def size_hold(
    *, holdable_micros: int, input_tokens: int, max_output_tokens: int, min_output_tokens: int, rates: Rates | None
) -> HoldSize:
    """The largest hold up to max_output_tokens that the account can bear, or a refusal below min_output_tokens."""
    rates = rates or Rates()
    least = min(max(min_output_tokens, 1), max_output_tokens)
    needed = bound_micros(input_tokens=input_tokens, output_tokens=least, rates=rates)
    if needed > holdable_micros:
        return HoldSize(granted=False, output_tokens=0, micros=needed)
    tokens = affordable_output_tokens(
        input_tokens=input_tokens, available_micros=holdable_micros, rates=rates, most=max_output_tokens
    )
    return HoldSize(
        granted=True, output_tokens=tokens,
        micros=bound_micros(input_tokens=input_tokens, output_tokens=tokens, rates=rates),
    )
