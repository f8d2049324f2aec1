"""Corrected usage of a charge that is booked: the books get the difference as an entry of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass

from metering.usage import Usage, UsageSource
from tokenstore_service.domain.entry import Entry, usage_from_numbers, usage_numbers


@dataclass(frozen=True, slots=True)
class Corrected:
    """What an entry corrects: the charge, what it had been booked with and what it had cost."""

    event_id: str
    usage: Usage
    charged_micros: int


def correction_event(event_id: str) -> str:
    """The event id of the entry that corrects another one; there is at most one."""
    return f"correct:{event_id}"


def corrected_to_text(first: Entry) -> str:
    """`details` of the entry that corrects `first`, so that it can be recomputed by itself."""
    assert first.usage is not None
    return json.dumps({
        "charged_micros": -first.amount_micros, "corrects": first.event_id, "usage": usage_numbers(first.usage)
    })


def corrected_from_text(details: str) -> Corrected:
    document = json.loads(details)
    usage = usage_from_numbers(document["usage"], UsageSource.ESTIMATED)
    return Corrected(document["corrects"], usage, document["charged_micros"])
