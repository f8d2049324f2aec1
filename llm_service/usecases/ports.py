"""What the use cases need from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from llm_service.domain.call import Billing, CallRecord, CallState
from llm_service.domain.chat import Delta, FinishReason, Message, Prompt
from llm_service.domain.deployment import Deployment, Directory
from metering.charge import Quote
from metering.usage import Usage


@dataclass(frozen=True, slots=True)
class HoldAsked:
    """Credit to set aside; tokens >= 0."""

    call_id: UUID
    billing: Billing
    provider: str
    model: str
    input_tokens: int
    max_output_tokens: int
    min_output_tokens: int


@dataclass(frozen=True, slots=True)
class HoldGranted:
    """Credit set aside for `max_output_tokens`; `quote` is None when no price rule matches."""

    held_micros: int
    max_output_tokens: int
    quote: Quote | None
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class BindingBudget:
    """The spend cap that leaves too little; `resets_at` None = never."""

    budget_id: str
    label_key: str
    label_value: str
    period: str
    limit_micros: int
    resets_at: datetime | None


@dataclass(frozen=True, slots=True)
class HoldRefused:
    """INSUFFICIENT_CREDIT, BUDGET_EXCEEDED, REQUEST_IN_FLIGHT, REQUEST_FINISHED or IDEMPOTENCY_CONFLICT."""

    reason: str
    needed_micros: int
    available_micros: int
    existing_call_id: UUID | None
    budget: BindingBudget | None = None


@dataclass(frozen=True, slots=True)
class ExpiredHold:
    """A hold of ours whose time ran out without a charge."""

    call_id: UUID
    user_id: str
    request_id: str
    scene: str
    provider: str
    model: str
    held_micros: int
    max_output_tokens: int
    opened_at: datetime
    closed_at: datetime


class CreditLedger(Protocol):
    """TokenStore. Every method raises DependencyUnavailable."""

    async def open_hold(self, asked: HoldAsked) -> HoldGranted | HoldRefused: ...

    async def release_hold(self, user_id: str, call_id: UUID) -> None: ...

    async def extend_holds(self, holds: Sequence[tuple[str, UUID]]) -> None: ...

    async def expired_holds(self, *, since: datetime) -> list[ExpiredHold]:
        """Those closed at or after `since`, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What a finished call answered, kept for a while for repeats of the request."""

    message: Message


@dataclass(frozen=True, slots=True)
class Settlement:
    """A call's end: the record, and the answer when it is to be kept."""

    record: CallRecord
    answer: Message | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A running call as it stands; its usage is what has been counted so far."""

    record: CallRecord


class CallJournal(Protocol):
    """The durable record of calls. Every method raises DependencyUnavailable."""

    async def settle(self, settlement: Settlement) -> CallRecord:
        """Commits the end and its charge event in one transaction. Answers what is recorded: when a sweeper was first,
        that is the sweeper's record."""
        ...

    async def beat(self, running: Sequence[Heartbeat]) -> set[UUID]:
        """Writes running calls down and renews their leases. Answers those that somebody asked to cancel."""
        ...

    async def find(self, call_id: UUID, user_id: str) -> CallRecord | None:
        """Empty user_id = any user's."""
        ...

    async def find_by_request(self, user_id: str, request_id: str) -> CallRecord | None:
        """The newest call with that request id."""
        ...

    async def answer_of(self, user_id: str, call_id: UUID) -> StoredAnswer | None: ...

    async def list_calls(
        self, user_id: str, *, conversation_id: str, state: CallState | None, before: tuple[datetime, UUID] | None,
        limit: int,
    ) -> list[CallRecord]: ...

    async def ask_to_cancel(self, user_id: str, call_id: UUID) -> None: ...

    async def claim_abandoned(self, *, limit: int) -> list[CallRecord]:
        """Running calls whose lease ran out, leased to the caller; several sweepers share them."""
        ...

    async def add_unknown_outcomes(self, holds: Sequence[ExpiredHold]) -> int:
        """Records calls of which only the hold is known; those that have a record are left alone."""
        ...

    async def sweep_cursor(self) -> datetime | None: ...

    async def move_sweep_cursor(self, to: datetime) -> None: ...

    async def prune_answers(self, *, before: datetime) -> int: ...


class UpstreamFailure(Exception):
    """A model server did not do what it was asked; the text is for logs and holds no content."""

    def __init__(
        self, reason: str, detail: str, *, http_status: int = 0, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds


@dataclass(slots=True)
class UpstreamChunk:
    """What one read from a model server brought."""

    deltas: list[Delta] = field(default_factory=list)
    pieces: int = 0
    """How many events carried content: at least one token each."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    upstream_model: str = ""


@dataclass(frozen=True, slots=True)
class UpstreamAnswer:
    """A whole answer."""

    message: Message
    finish_reason: FinishReason
    usage: Usage | None
    upstream_model: str


class ModelProvider(Protocol):
    """Speaks to model servers of one kind. Raises UpstreamFailure."""

    def stream(
        self, deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        """Chunks until the answer is complete: a finish reason came. Closing the iterator stops the model server.

        `on_sent` is told when the request goes out: from then on the model may run, and the call costs its input.
        """
        ...

    async def generate(
        self, deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, on_sent: Callable[[], None]
    ) -> UpstreamAnswer: ...


class TokenCounter(Protocol):
    """Counts tokens with a real tokenizer."""

    def count_text(self, text: str) -> int: ...

    async def count_prompt(self, prompt: Prompt) -> int: ...

    def count_message(self, message: Message) -> int: ...


class ModelDirectory(Protocol):
    """The registered models, at most 2 s old."""

    @property
    def directory(self) -> Directory: ...

    async def refresh(self) -> None: ...


class ModelRegistry(Protocol):
    """Registered models in the database, keys sealed."""

    async def add(self, deployment: Deployment, *, idempotency_key: str) -> Deployment: ...

    async def by_key(self, idempotency_key: str) -> Deployment | None: ...

    async def get(self, model_id: str) -> Deployment | None: ...

    async def list_models(
        self, *, alias: str, after: tuple[str, int, str] | None, limit: int
    ) -> list[Deployment]:
        """By alias, priority and id."""
        ...

    async def replace(self, deployment: Deployment, *, exclusive: bool = False) -> bool:
        """False when it is gone. `exclusive` takes all others of its alias out of service."""
        ...

    async def delete(self, model_id: str) -> bool: ...
