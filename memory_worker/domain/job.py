"""The work on one turn: its states, its model calls' identities, and when it is tried again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID

MOST_TRIES = 30
"""With the back-off below, about eight hours."""
FIRST_WAIT = timedelta(seconds=2)
LONGEST_WAIT = timedelta(minutes=20)
CREDIT_WAIT = timedelta(seconds=30)


class JobState(IntEnum):
    """Where a job stands; numbers as on the wire."""

    QUEUED = 1
    RUNNING = 2
    WAITING_FOR_CREDIT = 3
    DONE = 4
    DEAD = 5


@dataclass(frozen=True, slots=True)
class Said:
    """Something that was said; `role` as on the wire (3 = user, 4 = assistant)."""

    role: int
    text: str


@dataclass(frozen=True, slots=True)
class TurnText:
    """What a job works on. `sealed`: what was said, while nobody works on it; then the rest of it is empty."""

    said: tuple[Said, ...]
    context: tuple[Said, ...] = ()
    memory_ids: tuple[str, ...] = ()
    traceparent: str = ""
    sealed: bytes = b""


@dataclass(frozen=True, slots=True)
class Job:
    """The work on one turn. `generation` rises when a charged answer was lost and has to be asked for anew."""

    user_id: str
    job_id: UUID
    conversation_id: str
    message_id: str
    state: JobState
    tries: int
    occurred_at: datetime
    created_at: datetime
    turn: TurnText = field(default_factory=lambda: TurnText(()), repr=False)
    next_try_at: datetime | None = None
    ended_at: datetime | None = None
    reason: str = ""
    generation: int = 0
    calls: int = 0
    tokens: int = 0
    credit_micros: int = 0
    has_decisions: bool = True
    """It had decided something already when it was claimed."""


def wait_after(tries: int, *, draw: float) -> timedelta:
    """How long to wait after `tries` failures: doubling, with `draw` 0..1 as jitter over its upper half."""
    longest = min(FIRST_WAIT * 2 ** min(max(0, tries - 1), 20), LONGEST_WAIT)
    return timedelta(seconds=longest.total_seconds() * (0.5 + draw / 2))


def call_key(job: Job, stage: str, *parts: object) -> str:
    """Identity of a model call: the same work asks under the same request_id, so that it is charged once and answered
    alike, however often it is tried. `parts` are all that the question is made of."""
    text = repr((str(job.job_id), job.generation, stage, *map(str, parts)))
    return f"memory:{stage}:{hashlib.sha256(text.encode()).hexdigest()[:40]}"
