"""What the use cases need from outside: jobs, models, and the settings of the service. Memories: memory_ports.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from memory_worker.domain.job import Job, JobState, TurnText
from servicekit.core.offsets import OffsetMove


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished turn to remember from."""

    user_id: str
    conversation_id: str
    message_id: str
    occurred_at: datetime
    text: TurnText


class LeaseLost(Exception):
    """Another worker has the job."""


class JobQueue(Protocol):
    """Jobs in the database, shared by replicas. Every method raises DependencyUnavailable."""

    async def submit(
        self, turns: Sequence[Turn], moves: Sequence[OffsetMove] = ()
    ) -> list[tuple[UUID | None, bool]]:
        """One job for each turn, and whether it was known; None for what was said before its user was erased. With
        `moves` the offsets go in the same transaction."""
        ...

    async def claim(self, owner: str, *, limit: int, lease: timedelta) -> list[Job]:
        """What is due, oldest first, one job a user, leased."""
        ...

    async def beat(self, owner: str, job_ids: Sequence[UUID], *, lease: timedelta) -> None: ...

    async def finish(
        self, job: Job, owner: str, state: JobState, *, reason: str = "", next_try_in: timedelta | None = None,
        new_generation: bool = False,
    ) -> bool:
        """False when the job has ended but for questions whose cost is not known. Raises LeaseLost."""
        ...

    async def get(self, job_id: UUID, user_id: str) -> Job | None:
        """Empty user_id = any user's."""
        ...

    async def list_jobs(
        self, user_id: str, *, state: JobState | None, before: UUID | None, limit: int
    ) -> list[Job]: ...

    async def retry(self, job_id: UUID) -> Job | None:
        """None when it is in no state to be tried again."""
        ...


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What a model said, and what that cost; no text = it was cut, or said nothing."""

    text: str
    tokens: int = 0
    credit_micros: int = 0
    call_id: str = ""


class ModelCallFailed(Exception):
    """A model call did not work. `kind`: TRANSIENT (try again), NO_CREDIT, GONE (charged, answer lost), PERMANENT."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ModelQuestion:
    """A question whose answer follows a JSON schema."""

    request_id: str
    user_id: str
    scene: str
    alias: str
    instructions: str
    data: str
    schema_name: str
    schema: str
    traceparent: str = ""


class Models(Protocol):
    """llm_service."""

    async def ask(self, question: ModelQuestion) -> ModelAnswer:
        """Raises ModelCallFailed."""
        ...

    async def cost(self, user_id: str, request_id: str) -> ModelAnswer | None:
        """What a call cost whose answer was not heard, without its text; None = it never began. Raises
        ModelCallFailed, TRANSIENT while it runs."""
        ...


class AnswerJournal(Protocol):
    """Questions to models and their answers, kept until the jobs are done and a while longer. A question is written
    down before it is asked, so that what it cost is known even when its answer never came."""

    async def begin(self, job: Job, key: str, stage: str) -> ModelAnswer | None:
        """The answer that is there already; else None, and the question is written down."""
        ...

    async def keep(self, job: Job, key: str, answer: ModelAnswer) -> None:
        """Adds it to what the job cost, once."""
        ...

    async def unanswered(self, job: Job) -> list[str]:
        """Keys of questions of the job whose answer was not heard."""
        ...

    async def forget(self, job: Job, key: str) -> None:
        """A question that reached no model."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """How memories are made; settings of the service. Floors that are not given are the embedder's own."""

    decision: str = "set"
    pairwise: bool = False
    agreeing: int = 3
    most_candidates: int = 5
    floor: float | None = None
    retrieve_floor: float | None = None
    least_confidence: float = 0.5
    most_facts: int = 3
    most_calls: int = 24
    detectors: Mapping[Any, Any] = field(default_factory=dict)
