"""What was used, by hour: sums that are written with the charges and agree with the ledger to the unit."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from tokenstore_service.domain.correction import corrected_from_text
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource

REPRICED = int(EntryFlag.REPRICED)
CORRECTED = int(EntryFlag.CORRECTED)

ConsumptionKey = tuple[str, datetime, str, str]
"""User, hour (UTC, by occurrence), scene, model."""


class Consumption(NamedTuple):
    """Sums of entries; cached tokens are part of input, reasoning tokens part of output."""

    calls: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    micros: int = 0

    def plus(self, other: Consumption) -> Consumption:
        return Consumption(
            self.calls + other.calls, self.input_tokens + other.input_tokens,
            self.cached_input_tokens + other.cached_input_tokens, self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens, self.micros + other.micros,
        )


def add_entry(sums: list[int], entry: Entry) -> None:
    """Adds one entry's part to sums in the order of Consumption's fields. A later price and a reversal change the
    credit only, a correction the difference: the call was counted before."""
    usage = entry.usage
    sums[5] -= entry.amount_micros
    flags = int(entry.flags)
    if entry.source is EntrySource.REVERSAL or flags & REPRICED:
        return
    if flags & CORRECTED:
        before = corrected_from_text(entry.details).usage
        sums[1] -= before.input_tokens
        sums[2] -= before.cached_input_tokens
        sums[3] -= before.output_tokens
        sums[4] -= before.reasoning_tokens
    else:
        sums[0] += 1
    if usage is not None:
        sums[1] += usage.input_tokens
        sums[2] += usage.cached_input_tokens
        sums[3] += usage.output_tokens
        sums[4] += usage.reasoning_tokens


def consumption_key(entry: Entry) -> ConsumptionKey:
    return (
        entry.user_id, entry.occurred_at.replace(minute=0, second=0, microsecond=0), entry.scene, entry.model
    )


def new_sums() -> list[int]:
    return [0] * 6
