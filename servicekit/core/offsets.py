"""Moves of consumer offsets, which are committed with the effects of what was consumed."""

from __future__ import annotations

from dataclasses import dataclass


class StaleConsumer(Exception):
    """The stored offsets are not those that this consumer began at."""


@dataclass(frozen=True, slots=True)
class OffsetMove:
    """For one partition: the offset that was expected next, and the one after the batch."""

    topic: str
    partition: int
    first: int
    next: int
