"""What the use cases need of memories: items, decisions, vectors, and what keeps them in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from memory_worker.domain.decision import Action, Plan, Verdict
from memory_worker.domain.item import Fact, Item, ItemStatus, MemoryType
from memory_worker.domain.job import Job

Vector = tuple[float, ...]
Vectors = Mapping[str, Vector]
"""Of one text, by the name of the embedder that made them."""


@dataclass(frozen=True, slots=True)
class UserSettings:
    """What a user allows."""

    user_id: str
    memory_enabled: bool = True
    implicit_enabled: bool = True
    sensitive_enabled: bool = False

    @property
    def most_sensitive(self) -> int:
        """The highest sensitivity that may be given out."""
        return 2 if self.sensitive_enabled else 0


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
class Looking:
    """A text to find memories near to, as a vector of the embedder in use. `near`: what the vector database proposed;
    None = compare with each of the user's own."""

    vector: Vector
    embedder: str
    near: Sequence[UUID] | None = None


@dataclass(frozen=True, slots=True)
class Recall:
    """Candidates with their similarity, most similar first. `revision` is that of the user's memories when they were
    read: what is decided by them counts only while it is the same. `scanned`: each of the user's own was compared."""

    candidates: tuple[tuple[Item, float], ...]
    revision: int
    exact: Item | None = None
    scanned: bool = True


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a retrieval reads at once: the user's switches, what is near, and the constraints."""

    settings: UserSettings
    near: tuple[tuple[Item, float], ...]
    constraints: tuple[Item, ...]
    scanned: bool = True


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
    vectors: Vectors = field(default_factory=dict)
    merged_vectors: Vectors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A change of an item."""

    item: Item
    operation: str
    actor: str
    decision_id: UUID | None
    at: datetime


class MemoriesChanged(Exception):
    """The user's memories are no longer those that the decision was made upon."""


@dataclass(frozen=True, slots=True)
class Floors:
    """Cosine similarities below which nothing is a candidate to compare with, and nothing is given out."""

    recall: float
    retrieve: float


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors, one for each text, and what they cost."""

    vectors: list[Vector]
    tokens: int = 0
    credit_micros: int = 0
    call_id: str = ""


class Embedder(Protocol):
    """Makes vectors of texts. `name` tells vectors of different makers apart; they are never compared."""

    @property
    def name(self) -> str: ...

    @property
    def floors(self) -> Floors: ...

    @property
    def charges(self) -> bool:
        """It is a model that somebody pays."""
        ...

    async def embed(
        self, user_id: str, texts: Sequence[str], *, request_id: str, skip_charge: bool = False
    ) -> Embedded:
        """`skip_charge`: booked as 0, where it is not the user who wants it. Raises ModelCallFailed."""
        ...


class ItemStore(Protocol):
    """Items and their history. Every method raises DependencyUnavailable."""

    async def settings(self, user_id: str) -> UserSettings: ...

    async def set_settings(self, settings: UserSettings) -> None: ...

    async def look(
        self, user_id: str, looking: Looking | None, *, types: Sequence[MemoryType], most: int, floor: float,
        most_constraints: int,
    ) -> Outlook: ...

    async def similarities(
        self, user_id: str, vector: Vector, embedder: str, item_ids: Sequence[UUID]
    ) -> dict[UUID, float]:
        """Of these items, whatever has become of them; without those of another embedder."""
        ...

    async def items(
        self, user_id: str, *, status: ItemStatus, kind: MemoryType | None, before: UUID | None, limit: int
    ) -> list[Item]: ...

    async def items_as_of(
        self, user_id: str, moment: datetime, *, kind: MemoryType | None, before: UUID | None, limit: int
    ) -> list[Item]: ...

    async def item(self, user_id: str, item_id: UUID, *, as_of: datetime | None = None) -> Item | None: ...

    async def contents_of(self, user_id: str, item_ids: Sequence[str]) -> list[str]: ...

    async def create(self, item: Item, vectors: Vectors, *, actor: str, idempotency_key: str) -> Item:
        """The new one, or the active one with the same words, or the one that the key made."""
        ...

    async def change(
        self, user_id: str, item_id: UUID, changes: Mapping[str, Any], vectors: Vectors, *, actor: str,
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


class DecisionStore(Protocol):
    """Decisions about facts. Every method raises DependencyUnavailable."""

    async def decisions_of(self, user_id: str, job_id: UUID) -> list[Decision]: ...

    async def decision(self, user_id: str, decision_id: UUID) -> Decision | None: ...

    async def decision_about(self, user_id: str, item_id: UUID) -> Decision | None:
        """The newest that wrote the item."""
        ...

    async def recall(self, user_id: str, fact: Fact, looking: Looking, *, most: int, floor: float) -> Recall: ...

    async def apply(self, outcome: Outcome, owner: str) -> Decision:
        """All or nothing. Raises LeaseLost, MemoriesChanged."""
        ...


@dataclass(frozen=True, slots=True)
class IndexStatus:
    """Active items, those with a vector of the embedder in use, and what waits for the vector database."""

    items: int
    indexed: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what has ended is kept; None = for ever."""

    answers: timedelta
    ended_items: timedelta | None = None
    ended_jobs: timedelta | None = None


class Upkeep(Protocol):
    """What is done now and then, a batch at a time, so that whoever goes on goes on where another stopped. Every method
    raises DependencyUnavailable."""

    async def expire(self, *, limit: int) -> int: ...

    async def prune(self, kept: Retention, *, limit: int) -> dict[str, int]:
        """Rows removed, by table."""
        ...

    async def announce(self, embedder: str) -> None:
        """An embedder is wanted. The first serves at once, another is filled in first."""
        ...

    async def embedders(self) -> tuple[str, str]:
        """The one that serves, and the one that is being filled in or ""."""
        ...

    async def switch(self, embedder: str, *, settled: timedelta) -> bool:
        """From now on this one serves; False while active items lack its vector, or while it has not been wanted for
        `settled` (so that every replica knows of it)."""
        ...

    async def remove_retired(self, *, after: timedelta, limit: int) -> list[str]:
        """Removes vectors of embedders that no longer serve; answers which have none left."""
        ...

    async def unindexed(self, embedder: str, *, limit: int) -> list[Item]:
        """Active items without a vector of this embedder."""
        ...

    async def set_vector(self, item: Item, embedder: str, vector: Vector) -> None:
        """Unless the item has changed since."""
        ...

    async def index_status(self, embedder: str) -> IndexStatus: ...


class IndexAway(Exception):
    """The vector database does not answer."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """What a vector database is told of an item."""

    user_id: str
    item_id: UUID
    type: MemoryType
    version: int
    vector: Vector


class VectorIndex(Protocol):
    """A vector database beside PostgreSQL. It is told ids, types and vectors, never texts nor who a user is; what it
    answers is a proposal. Every method ends within its time and raises IndexAway."""

    async def search(
        self, embedder: str, user_id: str, vector: Vector, *, types: Sequence[MemoryType], most: int
    ) -> list[UUID]: ...

    async def put(self, embedder: str, entries: Sequence[IndexEntry]) -> None: ...

    async def remove(self, embedder: str, item_ids: Sequence[UUID]) -> None: ...

    async def forget(self, embedder: str, user_id: str) -> None: ...

    async def count(self, embedder: str, user_id: str) -> int:
        """What it has of a user."""
        ...

    async def versions(self, embedder: str, item_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Of those that it has."""
        ...

    def everything(self, embedder: str) -> AsyncIterator[dict[UUID, int]]:
        """Versions of all that it has, in parts."""
        ...

    async def drop(self, embedder: str) -> None:
        """All vectors of an embedder."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class IndexChange:
    """An item whose state the vector database is to be told: `entry`, or that it is no more."""

    user_id: str
    item_id: UUID
    change: int
    entry: IndexEntry | None


class IndexOutbox(Protocol):
    """What the vector database is still to be told. Every method raises DependencyUnavailable."""

    async def claim(self, embedder: str, *, limit: int, lease: timedelta) -> list[IndexChange]:
        """What is due, with the items as they are now."""
        ...

    async def done(self, changes: Sequence[IndexChange]) -> None:
        """Those that have not changed since."""
        ...

    async def waiting(self) -> int:
        """How many there are."""
        ...

    async def mark(self, items: Sequence[tuple[str, UUID]]) -> None: ...

    async def forget(self, user_id: str) -> None:
        """Nothing more is to be told of this user."""
        ...

    async def live(
        self, embedder: str, *, after: tuple[str, UUID] | None, limit: int
    ) -> list[tuple[str, UUID, int]]:
        """User, item and version of the vector, of active items, in order."""
        ...

    async def versions(self, embedder: str, item_ids: Sequence[UUID]) -> dict[UUID, tuple[str, int]]:
        """User and version of the vector, of those that are active."""
        ...
