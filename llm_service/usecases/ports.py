"""What the use cases need from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from llm_service.domain.call import Billing, CallRecord, CallState
from llm_service.domain.chat import Delta, FinishReason, Message, Prompt, Role
from llm_service.domain.conversation import Turn
from llm_service.domain.deployment import Deployment, Directory
from llm_service.domain.rate_limit import Limits
from llm_service.domain.routing import FailureKind
from metering.charge import Quote
from metering.usage import Usage

Vectors = tuple[tuple[float, ...], ...]


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
    other_providers: tuple[str, ...] = ()
    """They may serve the call too; the hold reaches for the dearest."""


@dataclass(frozen=True, slots=True)
class HoldGranted:
    """Credit set aside for `max_output_tokens`; `quotes` are prices by provider, of those that a price rule matches."""

    held_micros: int
    max_output_tokens: int
    quotes: Mapping[str, Quote]
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

    async def open_hold(self, asked: HoldAsked, *, traceparent: str = "") -> HoldGranted | HoldRefused: ...

    async def release_hold(self, user_id: str, call_id: UUID) -> None: ...

    async def extend_holds(self, holds: Sequence[tuple[str, UUID]]) -> None: ...

    async def expired_holds(self, *, since: datetime) -> list[ExpiredHold]:
        """Those closed at or after `since`, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What a finished call answered, kept for a while for repeats of the request: a message, or vectors."""

    message: Message = Message(Role.ASSISTANT)
    vectors: Vectors = ()


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The answer of a conversation's turn, as far as it came. `prompt_tokens` is what it will weigh in prompts, by the
    tokenizers of `token_family`; `summary_until` > 0 asks for a summary of what stands before that position."""

    turn: Turn
    message: Message
    prompt_tokens: int
    token_family: str
    summary_until: int = 0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Settlement:
    """A call's end: the record, and the answer when it is to be kept. `traceparent`: the trace that it belongs to."""

    record: CallRecord
    answer: StoredAnswer | None = None
    traceparent: str = ""
    turn_end: TurnEnd | None = None
    """Of a conversation's call: stored in the same transaction."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A running call as it stands; its usage is what has been counted so far."""

    record: CallRecord
    turn_end: TurnEnd | None = None


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


class AbandonedTurns(Protocol):
    """The conversations' side of the sweeper."""

    async def abandoned_turn(self, record: CallRecord) -> TurnEnd | None:
        """What is known of the turn of a call whose process died."""
        ...


class UpstreamFailure(Exception):
    """A model server did not do what it was asked; the text is for logs and holds no content."""

    def __init__(
        self, reason: str, detail: str, *, kind: FailureKind = FailureKind.UNAVAILABLE, http_status: int = 0,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.kind = kind
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds


@dataclass(slots=True)
class UpstreamChunk:
    """What one read from a model server brought."""

    deltas: list[Delta] = field(default_factory=list)
    pieces: int = 0
    """How many events carried content: at least one token each."""
    finish_reason: FinishReason | None = None
    upstream_finish_reason: str = ""
    is_unknown_finish: bool = False
    usages: list[Usage] = field(default_factory=list)
    upstream_model: str = ""
    vectors: Vectors = ()
    malformed: int = 0
    """Events that could not be read and were left out."""

    @property
    def usage(self) -> Usage | None:
        """The newest that was told."""
        return self.usages[-1] if self.usages else None

    @usage.setter
    def usage(self, usage: Usage | None) -> None:
        if usage is not None:
            self.usages.append(usage)

    def __bool__(self) -> bool:
        return bool(
            self.deltas or self.usages or self.finish_reason is not None or self.vectors or self.malformed
        )


@dataclass(frozen=True, slots=True)
class Question:
    """What one attempt asks: a prompt to answer, or inputs to embed. `whole`: not as a stream."""

    prompt: Prompt
    max_output_tokens: int
    whole: bool
    inputs: tuple[str, ...] = ()
    dimensions: int | None = None


class ModelProvider(Protocol):
    """Speaks to model servers of one kind."""

    def ask(
        self, deployment: Deployment, question: Question, *, on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        """Chunks until the answer is complete; one, when it is asked for whole. Closing the iterator stops the server.

        `on_sent` is told when the request goes out: from then on the model may run, and the call costs its input.
        Raises UpstreamFailure; what was told before it is in the chunks before.
        """
        ...


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The best estimate, and what a hold is made for: hardly any tokenizer of the family counts more."""

    input_tokens: int
    upper_bound: int


class TokenCounter(Protocol):
    """Counts tokens, by families of tokenizers; see domain/token_family.py."""

    def count_text(self, text: str, family: str = ...) -> int: ...

    async def count_prompt(self, prompt: Prompt, *, family: str = ..., upstream_model: str = ...) -> TokenCount: ...

    async def count_inputs(self, inputs: tuple[str, ...], *, family: str = ...) -> TokenCount: ...

    def count_message(self, message: Message, family: str = ...) -> int: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Taken below the limits of a subject; to be given back with `leave`."""

    subject: str
    limits: Limits
    ticket: str
    tokens: int


class Limiter(Protocol):
    """Counts what runs and what ran in the last minute, by subject: `model:<id>` or `user:<id>`."""

    async def enter(self, subject: str, limits: Limits, *, tokens: int) -> Place | float:
        """A place, or after how many seconds it is worth asking again."""
        ...

    def leave(self, place: Place, *, used_tokens: int) -> None:
        """At once; tokens that were taken and not used are given back."""
        ...

    async def keep(self, places: Sequence[Place]) -> None:
        """These still run; places of processes that died are free again after a while."""
        ...

    async def freed(self, subject: str, seconds: float) -> None:
        """Waits until somebody of this process leaves, or so long."""
        ...


@dataclass(frozen=True, slots=True)
class UserPolicy:
    """What one user may do, where it differs from the service's settings; `limits` None = the defaults."""

    user_id: str
    limits: Limits | None = None
    keep_no_answers: bool = False
    updated_at: datetime | None = None


class UserPolicies(Protocol):
    """The policies of all users that have one, at most 2 s old."""

    def of(self, user_id: str) -> UserPolicy | None: ...

    async def refresh(self) -> None: ...


class UserPolicyStore(Protocol):
    """Policies in the database."""

    async def get_policy(self, user_id: str) -> UserPolicy | None: ...

    async def set_policy(self, policy: UserPolicy) -> None:
        """Deletes kept answers too, where the policy says so."""
        ...

    async def delete_policy(self, user_id: str) -> None: ...

    async def list_policies(self, *, after: str, limit: int) -> list[UserPolicy]:
        """By user."""
        ...


class ModelDirectory(Protocol):
    """The registered models, at most 2 s old."""

    @property
    def directory(self) -> Directory: ...

    @property
    def revision(self) -> int:
        """Rises with every change."""
        ...

    async def changed(self, revision: int) -> None:
        """Waits until the directory is newer than that."""
        ...

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

    async def reseal(self) -> int:
        """Seals every key that is sealed under an older secret key again, under the newest. Returns how many."""
        ...
