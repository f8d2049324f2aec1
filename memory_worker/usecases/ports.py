"""What the use cases need from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from memory_worker.domain.decision import Action, Plan, Verdict
from memory_worker.domain.item import Fact, Item, ItemStatus, MemoryType
from memory_worker.domain.job import Job, JobState, TurnText
from servicekit.core.offsets import OffsetMove

Vector = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished turn to remember from."""

    user_id: str
    conversation_id: str
    message_id: str
    occurred_at: datetime
    text: TurnText


@dataclass(frozen=True, slots=True)
class UserSettings:
    """What a user allows."""

    user_id: str
    memory_enabled: bool = True
    implicit_enabled: bool = True
    sensitive_enabled: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about one fact, and what was seen. `items`: the one that carries the fact, then those closed."""

    decision_id: UUID
    job_id: UUID
    number: int
    fact: Fact
    action: Action
    reason: str
    verdicts: tuple[Verdict, ...]
    items: tuple[UUID, ...]
    policy: str
    recall: str
    prompts: str
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class Recall:
    """Candidates with their similarity, most similar first. `revision` is that of the user's memories when they were
    read: what is decided by them counts only while it is the same."""

    candidates: tuple[tuple[Item, float], ...]
    revision: int
    exact: Item | None = None
    source: str = "vector"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A decision to be written: which fact of which job, by which plan, upon which revision of the user's memories."""

    job: Job
    number: int
    fact: Fact
    plan: Plan
    reason: str
    verdicts: tuple[Verdict, ...]
    revision: int
    recall: str
    policy: str
    prompts: str
    vector: Vector = ()
    merged_vector: Vector = ()


class LeaseLost(Exception):
    """Another worker has the job."""


class MemoriesChanged(Exception):
    """The user's memories are no longer those that the decision was made upon."""


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
    ) -> None:
        """Raises LeaseLost."""
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


class AnswerJournal(Protocol):
    """Model answers of jobs, kept until the jobs are done and a while longer."""

    async def find(self, user_id: str, key: str) -> ModelAnswer | None: ...

    async def keep(self, job: Job, key: str, stage: str, answer: ModelAnswer) -> None:
        """Adds it to what the job cost, once."""
        ...


class Embedder(Protocol):
    """Makes vectors of texts. `name` tells vectors of different makers apart; they are never compared."""

    @property
    def name(self) -> str: ...

    async def embed(
        self, user_id: str, texts: Sequence[str], *, request_id: str, skip_charge: bool = False
    ) -> list[Vector]:
        """`skip_charge`: booked as 0, where it is not the user who wants it. Raises ModelCallFailed."""
        ...


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A change of an item."""

    item: Item
    operation: str
    actor: str
    decision_id: UUID | None
    at: datetime


class MemoryStore(Protocol):
    """Items, their history and decisions. Every method raises DependencyUnavailable."""

    async def settings(self, user_id: str) -> UserSettings: ...

    async def set_settings(self, settings: UserSettings) -> None: ...

    async def decisions_of(self, user_id: str, job_id: UUID) -> list[Decision]: ...

    async def decision(self, user_id: str, decision_id: UUID) -> Decision | None: ...

    async def decision_about(self, user_id: str, item_id: UUID) -> Decision | None:
        """The newest that wrote the item."""
        ...

    async def recall(
        self, user_id: str, fact: Fact, vector: Vector, embedder: str, *, most: int, floor: float
    ) -> Recall: ...

    async def apply(self, outcome: Outcome, owner: str, embedder: str) -> Decision:
        """All or nothing. Raises LeaseLost, MemoriesChanged."""
        ...

    async def similar(
        self, user_id: str, vector: Vector, embedder: str, *, types: Sequence[MemoryType], most: int, floor: float
    ) -> list[tuple[Item, float]]: ...

    async def similarities(
        self, user_id: str, vector: Vector, embedder: str, item_ids: Sequence[UUID]
    ) -> dict[UUID, float]:
        """Of these items, whatever has become of them; without those of another embedder."""
        ...

    async def constraints(self, user_id: str, *, most: int) -> list[Item]: ...

    async def items(
        self, user_id: str, *, status: ItemStatus, kind: MemoryType | None, before: UUID | None, limit: int
    ) -> list[Item]: ...

    async def items_as_of(
        self, user_id: str, moment: datetime, *, kind: MemoryType | None, before: UUID | None, limit: int
    ) -> list[Item]: ...

    async def item(self, user_id: str, item_id: UUID, *, as_of: datetime | None = None) -> Item | None: ...

    async def contents_of(self, user_id: str, item_ids: Sequence[str]) -> list[str]: ...

    async def create(
        self, item: Item, vector: Vector, embedder: str, *, actor: str, idempotency_key: str
    ) -> Item:
        """The new one, or the active one with the same words, or the one that the key made."""
        ...

    async def change(
        self, user_id: str, item_id: UUID, changes: Mapping[str, Any], vector: Vector, embedder: str, *, actor: str,
        operation: str, version: int | None,
    ) -> Item:
        """Raises ItemNotFound, ItemNotChangeable, VersionConflict."""
        ...

    async def restore(self, user_id: str, item_id: UUID, *, actor: str) -> Item:
        """Raises ItemNotFound, ItemNotChangeable."""
        ...

    async def audit(
        self, user_id: str, *, item_id: UUID | None, before: tuple[datetime, UUID, int] | None, limit: int
    ) -> list[AuditEntry]: ...

    async def erase(self, user_id: str) -> dict[str, int]:
        """Everything of the user; rows by table."""
        ...

    async def expire(self, *, limit: int) -> int: ...

    async def prune(self, *, older_than: timedelta, limit: int) -> int: ...

    async def unindexed(self, embedder: str, *, limit: int) -> list[Item]:
        """Active items without a vector of this embedder."""
        ...

    async def set_vector(self, item: Item, vector: Vector, embedder: str) -> None:
        """Unless the item has changed since."""
        ...

    async def index_status(self, embedder: str) -> tuple[int, int]:
        """Active items, and those with a vector of this embedder."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """How memories are made; settings of the service."""

    decision: str = "set"
    pairwise: bool = False
    confirm: bool = True
    most_candidates: int = 5
    floor: float = 0.1
    retrieve_floor: float = 0.15
    least_confidence: float = 0.5
    most_facts: int = 3
    most_calls: int = 24
    detectors: Mapping[Any, Any] = field(default_factory=dict)
