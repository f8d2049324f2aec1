"""A call: its states, how each end is settled, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum, IntEnum, auto
from typing import Any
from uuid import UUID

from llm_service.domain.chat import FinishReason
from metering.charge import Quote, charge_micros
from metering.usage import Usage, UsageSource


class CallState(IntEnum):
    """Where a call stands; numbers as on the wire. RUNNING goes to exactly one of the others (I6).

    UNKNOWN_OUTCOME may still become SETTLED: when a process that was taken for dead wakes up with the real usage. No
    charge event was made for it before, so there is still at most one.
    """

    RUNNING = 1
    SETTLED = 2
    FAILED = 3
    UNKNOWN_OUTCOME = 4


class ChargeStatus(IntEnum):
    """What became of a charge; numbers as on the wire."""

    CHARGED = 1
    SKIPPED = 2
    UNPRICED = 3
    FREE = 4


@dataclass(frozen=True, slots=True)
class Charge:
    """The price of a call in micro-credits; the ledger books the same amount."""

    credit_micros: int
    status: ChargeStatus
    price_rule_id: str = ""
    price_rule_version: int = 0


@dataclass(frozen=True, slots=True)
class Billing:
    """Who pays and how the call is told apart from others."""

    user_id: str
    request_id: str
    scene: str
    conversation_id: str = ""
    skip_charge: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    request_fingerprint: bytes = b""
    request_id_was_given: bool = False


class AttemptKind(IntEnum):
    """Why an attempt was made; numbers as on the wire."""

    FIRST = 1
    RETRY = 2
    FALLBACK = 3
    HEDGE = 4
    REPAIR = 5


class Operation(IntEnum):
    """What a call does; numbers as on the wire."""

    CHAT = 1
    EMBED = 2


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try against one deployment. `charged`: its usage is part of what the call is charged for."""

    number: int
    model_id: str
    provider: str
    upstream_model: str
    started_at: datetime
    first_token_at: datetime | None = None
    ended_at: datetime | None = None
    error_reason: str = ""
    http_status: int = 0
    kind: AttemptKind = AttemptKind.FIRST
    usage: Usage | None = None
    charged: bool = False
    upstream_finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What the journal keeps of a call; no content."""

    call_id: UUID
    billing: Billing
    model: str
    provider: str
    price_provider: str
    upstream_model: str
    state: CallState
    streamed: bool
    hold_micros: int
    max_output_tokens: int
    quote: Quote | None
    usage: Usage
    created_at: datetime
    finish_reason: FinishReason = FinishReason.UNSPECIFIED
    error_reason: str = ""
    charge: Charge | None = None
    attempts: tuple[Attempt, ...] = ()
    first_token_at: datetime | None = None
    ended_at: datetime | None = None
    swept: bool = False
    operation: Operation = Operation.CHAT


class End(Enum):
    """How a call came to its end."""

    COMPLETED = auto()
    CUT = auto()
    """The granted output tokens were used up and the model server went on."""
    CLIENT_GONE = auto()
    DEADLINE = auto()
    MODEL_TIMEOUT = auto()
    """The model's total timeout."""
    UPSTREAM_FAILED = auto()
    SCHEMA_MISMATCH = auto()
    """Answer and repair were delivered by the model, and neither follows the JSON Schema."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an end means: charged or not, and what is told."""

    charged: bool
    finish_reason: FinishReason
    error_reason: str = ""


_INTERRUPTED = {
    End.CLIENT_GONE: (FinishReason.CANCELLED, "CANCELLED"),
    End.DEADLINE: (FinishReason.DEADLINE, "DEADLINE_EXCEEDED"),
}


def judge(
    end: End, *, finish_reason: FinishReason, reached_model: bool, delivered: bool, clipped: bool,
    error_reason: str = "", billed: bool = False,
) -> Verdict:
    """How an end is settled. What was delivered is charged; what never reached a model is not.

    A client that leaves, or whose deadline passes, after the model was asked pays for the input. A model server that
    fails before its first token costs the user nothing, unless its provider bills that and reported what (`billed`).
    `clipped`: credit, not the request, set the output bound.
    """
    if end is End.COMPLETED:
        if finish_reason is FinishReason.LENGTH and clipped:
            return Verdict(charged=True, finish_reason=FinishReason.CREDIT_EXHAUSTED)
        return Verdict(charged=True, finish_reason=finish_reason)
    if end is End.CUT:
        reason = FinishReason.CREDIT_EXHAUSTED if clipped else FinishReason.LENGTH
        return Verdict(charged=True, finish_reason=reason)
    if end in _INTERRUPTED:
        finish, error = _INTERRUPTED[end]
        return Verdict(charged=reached_model or billed, finish_reason=finish, error_reason=error)
    if end is End.SCHEMA_MISMATCH:
        return Verdict(charged=True, finish_reason=finish_reason, error_reason="UPSTREAM_REJECTED")
    if not delivered:
        return Verdict(charged=billed, finish_reason=FinishReason.UPSTREAM_ERROR, error_reason=error_reason)
    finish = FinishReason.DEADLINE if end is End.MODEL_TIMEOUT else FinishReason.UPSTREAM_ERROR
    return Verdict(charged=True, finish_reason=finish, error_reason=error_reason)


def price(usage: Usage, quote: Quote | None, *, skip_charge: bool) -> Charge:
    """The charge for usage at the quoted rates."""
    rule = (quote.rule_id, quote.version) if quote else ("", 0)
    if skip_charge:
        return Charge(0, ChargeStatus.SKIPPED, *rule)
    if quote is None:
        return Charge(0, ChargeStatus.UNPRICED)
    micros = charge_micros(usage, quote.rates)
    return Charge(micros, ChargeStatus.CHARGED if micros else ChargeStatus.FREE, *rule)


def settle(
    record: CallRecord, verdict: Verdict, usage: Usage, *, at: datetime, **facts: Any
) -> CallRecord:
    """The record of a call that ended. `facts`: more fields of the record, in the one copy that is made."""
    quote = facts.pop("quote", record.quote)
    if not verdict.charged:
        return replace(
            record, state=CallState.FAILED, finish_reason=verdict.finish_reason, error_reason=verdict.error_reason,
            usage=Usage(source=UsageSource.ESTIMATED), charge=None, ended_at=at, quote=quote, **facts,
        )
    return replace(
        record, state=CallState.SETTLED, finish_reason=verdict.finish_reason, error_reason=verdict.error_reason,
        usage=usage, charge=price(usage, quote, skip_charge=record.billing.skip_charge), ended_at=at, quote=quote,
        **facts,
    )


def sweep(record: CallRecord, *, at: datetime) -> CallRecord:
    """The record of a call whose process died: charged by its last checkpoint, or an outcome that nobody knows."""
    if record.usage.output_tokens == 0:
        return replace(record, state=CallState.UNKNOWN_OUTCOME, ended_at=at, swept=True)
    verdict = Verdict(charged=True, finish_reason=FinishReason.UNSPECIFIED)
    usage = replace(record.usage, source=UsageSource.ESTIMATED)
    return replace(settle(record, verdict, usage, at=at), swept=True)


def unknown_outcome(
    *, call_id: UUID, user_id: str, request_id: str, scene: str, provider: str, model: str, hold_micros: int,
    max_output_tokens: int, opened_at: datetime, closed_at: datetime,
) -> CallRecord:
    """The record of a call of which only the hold is left: its process died before it wrote anything else."""
    return CallRecord(
        call_id=call_id, billing=Billing(user_id=user_id, request_id=request_id, scene=scene), model=model,
        provider=provider, price_provider=provider, upstream_model="", state=CallState.UNKNOWN_OUTCOME, streamed=False,
        hold_micros=hold_micros, max_output_tokens=max_output_tokens, quote=None,
        usage=Usage(source=UsageSource.ESTIMATED), created_at=opened_at, ended_at=closed_at, swept=True,
    )
