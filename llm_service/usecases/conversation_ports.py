"""What conversations need from outside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Protocol
from uuid import UUID

from llm_service.domain.conversation import (
    Branch,
    Conversation,
    ConversationStatus,
    Place,
    Segment,
    StoredMessage,
    Turn,
)
from llm_service.usecases.ports import AbandonedTurns


class OpenTurn(Protocol):
    """A conversation that is locked in a transaction, until the turn is begun or refused."""

    @property
    def conversation(self) -> Conversation: ...

    @property
    def running_is_stale(self) -> bool:
        """What runs there has no sign of life: its process died before it wrote anything else."""
        ...

    @property
    def answer(self) -> tuple[StoredMessage, bytes] | None:
        """The answer of an earlier request with the same request_id, and that request's fingerprint."""
        ...

    async def message(self, message_id: UUID) -> StoredMessage | None: ...

    async def branches(self) -> dict[int, Branch]: ...

    async def messages(self, path: Sequence[Segment]) -> list[StoredMessage]:
        """Oldest first."""
        ...

    async def drop_stale(self) -> None: ...

    async def fork(self, *, parent: int, at: int) -> int:
        """A new branch; its number."""
        ...

    async def begin(
        self, sent: Sequence[StoredMessage], answer: StoredMessage, *, call_id: UUID, fingerprint: bytes,
        until: datetime,
    ) -> None:
        """Writes the turn down; it is there when the transaction is."""
        ...


class ConversationStore(AbandonedTurns, Protocol):
    """Conversations in the database. Every method raises DependencyUnavailable."""

    async def create(self, conversation: Conversation, *, idempotency_key: str) -> Conversation:
        """The new one, or the one that the key made."""
        ...

    async def get(self, user_id: str, conversation_id: UUID) -> Conversation | None: ...

    async def list_conversations(
        self, user_id: str, *, title_contains: str, status: ConversationStatus | None,
        before: tuple[datetime, UUID] | None, limit: int,
    ) -> list[Conversation]:
        """The one last used first."""
        ...

    async def update(self, user_id: str, conversation_id: UUID, changes: dict[str, Any]) -> Conversation | None: ...

    async def delete(self, user_id: str, conversation_id: UUID) -> UUID | None:
        """Erases the content. Answers a call that still runs there. Raises ConversationNotFound."""
        ...

    async def branches(self, user_id: str, conversation_id: UUID) -> dict[int, Branch]: ...

    async def message(self, user_id: str, conversation_id: UUID, message_id: UUID) -> StoredMessage | None: ...

    async def messages(
        self, user_id: str, conversation_id: UUID, path: Sequence[Segment], *, limit: int
    ) -> list[StoredMessage]:
        """Oldest first, at most `limit`; what is pending is left out."""
        ...

    async def all_messages(
        self, user_id: str, conversation_id: UUID, *, after: UUID | None, limit: int
    ) -> list[StoredMessage]:
        """Of all branches, by identity."""
        ...

    def open_turn(
        self, user_id: str, conversation_id: UUID, request_id: str
    ) -> AbstractAsyncContextManager[OpenTurn]:
        """Raises ConversationNotFound."""
        ...

    async def undo_turn(self, turn: Turn, call_id: UUID) -> None:
        """Takes back a turn whose call never began."""
        ...


class TaskKind(IntEnum):
    """What is done for a conversation in the background."""

    TITLE = 1
    SUMMARY = 2


@dataclass(frozen=True, slots=True)
class ConversationTask:
    """Background work, leased. `place`: where a summary ends."""

    user_id: str
    conversation_id: UUID
    kind: TaskKind
    tries: int
    place: Place


class ConversationTasks(Protocol):
    """Background work in the database, shared by replicas."""

    async def claim(self, *, limit: int) -> list[ConversationTask]:
        """What is due, leased to the caller."""
        ...

    async def done(self, task: ConversationTask) -> None: ...

    async def postpone(self, task: ConversationTask, *, seconds: float) -> None: ...

    async def set_title(self, task: ConversationTask, title: str) -> None:
        """Only where there is none; ends the task in the same transaction."""
        ...

    async def mismatches(self, *, most: int) -> int:
        """How many of the conversations last used do not agree with their calls."""
        ...

    async def set_summary(self, task: ConversationTask, summary: str) -> None:
        """Ends the task in the same transaction."""
        ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Something remembered of a user."""

    memory_id: str
    kind: str
    content: str


class Memories(Protocol):
    """The memory service."""

    async def retrieve(self, user_id: str, query: str, *, traceparent: str) -> list[Memory] | None:
        """None when it does not answer in time."""
        ...
