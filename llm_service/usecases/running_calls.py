"""The calls that run in this process, for attempts, heartbeats and CancelCall."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from llm_service.domain.call import Attempt, AttemptKind, CallRecord
from llm_service.domain.chat import Answer, FinishReason
from llm_service.domain.conversation import Turn
from llm_service.domain.deployment import Deployment
from llm_service.domain.token_family import family_of
from llm_service.domain.usage_merge import add_usage
from llm_service.usecases.ports import Place, TurnEnd, UpstreamFailure, Vectors
from metering.charge import Quote, affordable_output_tokens, dearest
from metering.usage import Usage, UsageSource

NOTHING = Usage()


@dataclass(slots=True)
class RunningAttempt:
    """One try, while it runs and afterwards. `bound`: output tokens that it may make."""

    number: int
    kind: AttemptKind
    deployment: Deployment
    bound: int
    input_tokens: int
    started_at: datetime
    started_seconds: float
    answer: Answer = field(default_factory=Answer)
    vectors: Vectors = ()
    counted_output_tokens: int = 0
    usage: Usage | None = None
    upstream_model: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    upstream_finish_reason: str = ""
    is_unknown_finish: bool = False
    reached_model: bool = False
    first_token_at: datetime | None = None
    first_token_seconds: float | None = None
    ended_at: datetime | None = None
    error_reason: str = ""
    http_status: int = 0
    charged_usage: Usage | None = None
    """What the call is charged for it; None = nothing."""

    def mark_sent(self) -> None:
        self.reached_model = True

    @property
    def family(self) -> str:
        return tokens_of(self.deployment)

    def end(self, at: datetime, failure: UpstreamFailure | None = None) -> None:
        self.ended_at = at
        if failure is not None:
            self.error_reason, self.http_status = failure.reason, failure.http_status
            deployment = self.deployment
            if deployment.bills_failed_attempts and self.usage is not None:
                self.charged_usage = self.usage

    def to_record(self, *, at: datetime) -> Attempt:
        return Attempt(
            number=self.number, model_id=self.deployment.model_id, provider=self.deployment.provider.name,
            upstream_model=self.upstream_model or self.deployment.upstream_model, started_at=self.started_at,
            first_token_at=self.first_token_at, ended_at=self.ended_at or at, error_reason=self.error_reason,
            http_status=self.http_status, kind=self.kind, usage=self.charged_usage or self.usage,
            charged=self.charged_usage is not None, upstream_finish_reason=self.upstream_finish_reason,
        )


def tokens_of(deployment: Deployment) -> str:
    """The family of tokenizers that a deployment's tokens are counted with."""
    return family_of(deployment.upstream_model, deployment.tokenizer)


@dataclass(slots=True)
class RunningCall:
    """A call while it runs. Times `*_seconds` are on the monotonic clock.

    `input_tokens` and `input_bound` are by family of tokenizers: the best estimate, and what the hold reached for.
    """

    record: CallRecord
    tiers: Sequence[Sequence[Deployment]]
    quotes: Mapping[str, Quote]
    input_tokens: Mapping[str, int]
    input_bound: int
    clipped: bool
    may_repair: bool
    started_seconds: float
    hold_seconds: float
    hold_expires_at: datetime
    deadline_seconds: float | None
    task: asyncio.Task[object] | None
    attempts: list[RunningAttempt] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    delivered: bool = False
    """Something of an answer went to the client."""
    first_token_seconds: float | None = None
    first_token_at: datetime | None = None
    queued_seconds: float = 0.0
    error_reason: str = ""
    is_cancelled: bool = False
    is_waiting: bool = False
    is_overdue: bool = False
    is_ended: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    traceparent: str = ""
    turn: Turn | None = None
    summary_until: int = 0
    _watch: asyncio.TimerHandle | None = None
    _watch_at: float = 0.0
    _overdue_at: float = 0.0

    @property
    def call_id(self) -> UUID:
        return self.record.call_id

    @property
    def user_id(self) -> str:
        return self.record.billing.user_id

    @property
    def attempt(self) -> RunningAttempt | None:
        """The newest."""
        return self.attempts[-1] if self.attempts else None

    @property
    def deployment(self) -> Deployment:
        """The one that is asked, or the first choice."""
        return self.attempts[-1].deployment if self.attempts else self.tiers[0][0]

    @property
    def answer(self) -> Answer:
        return self.attempts[-1].answer if self.attempts else Answer()

    @property
    def reached_model(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].reached_model

    # Being interrupted

    def cancel(self) -> None:
        """As if the client had left; the call is settled for what was delivered, and the client is told.

        The task is cancelled only while it waits; elsewhere it looks at `is_cancelled` by itself.
        """
        if not self.is_ended and not self.is_cancelled:
            self.is_cancelled = True
            if self.is_waiting and self.task is not None:
                self.task.cancel()

    def watch_until(self, at: float) -> None:
        """What is waited for is overdue at `at`, on the loop's clock. One timer serves a whole call: it is only set
        anew when it rings, so that a token costs no timer."""
        self._overdue_at = at
        if self._watch is None or at < self._watch_at:
            if self._watch is not None:
                self._watch.cancel()
            self._arm(at)

    def stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _arm(self, at: float) -> None:
        self._watch_at = at
        self._watch = asyncio.get_running_loop().call_at(at, self._ring)

    def _ring(self) -> None:
        self._watch = None
        if self._overdue_at > asyncio.get_running_loop().time():
            self._arm(self._overdue_at)
        elif self.is_waiting and self.task is not None and not self.is_cancelled:
            self.is_overdue = True
            self.task.cancel()

    def was_interrupted(self) -> bool:
        """Whether it was we who cancelled the task, and not the client who left; then the task goes on."""
        task = asyncio.current_task()
        if (self.is_cancelled or self.is_overdue) and task is not None and task.cancelling() == 1:
            task.uncancel()
            return True
        return False

    # What it costs

    def spent(self) -> Usage:
        """What earlier attempts of this call are charged for."""
        total = NOTHING
        for attempt in self.attempts:
            if attempt.charged_usage is not None:
                total = attempt.charged_usage if total is NOTHING else add_usage(total, attempt.charged_usage)
        return total

    def bound_of_next(self, input_bound: int) -> int:
        """Output tokens that the hold still pays for, with so many input tokens; below 1 = not even these."""
        granted = self.record.max_output_tokens
        spent = self.spent()
        if spent is NOTHING or not self.quotes or self.record.billing.skip_charge:
            return granted
        tokens = affordable_output_tokens(
            input_tokens=spent.input_tokens + input_bound, available_micros=self.record.hold_micros,
            rates=dearest([quote.rates for quote in self.quotes.values()]), most=spent.output_tokens + granted,
        )
        return tokens - spent.output_tokens

    def checkpoint(self) -> CallRecord:
        """The record with the usage counted so far."""
        attempt = self.attempt
        current = Usage(
            input_tokens=attempt.input_tokens if attempt else next(iter(self.input_tokens.values())),
            output_tokens=min(attempt.counted_output_tokens, attempt.bound) if attempt else 0,
            source=UsageSource.ESTIMATED,
        )
        spent = self.spent()
        return replace(
            self.record, usage=current if spent is NOTHING else add_usage(spent, current),
            first_token_at=self.first_token_at, **(self.served_by(attempt) if attempt else {}),
        )

    def turn_so_far(self) -> TurnEnd | None:
        """What a conversation keeps when the process dies now."""
        if self.turn is None or not self.delivered:
            return None
        tokens = self.attempts[-1].counted_output_tokens
        return TurnEnd(self.turn, self.answer.message(), tokens, self.attempts[-1].family, self.summary_until)

    def served_by(self, attempt: RunningAttempt) -> dict[str, Any]:
        """What of the record is as the model that serves it has it: its price holds for the whole call."""
        deployment = attempt.deployment
        return {
            "provider": deployment.provider.name, "price_provider": deployment.provider_for_price,
            "upstream_model": attempt.upstream_model or deployment.upstream_model,
            "quote": self.quotes.get(deployment.provider_for_price),
        }


class RunningCalls:
    """All calls of this process that have a hold and no settlement yet."""

    def __init__(self) -> None:
        self._calls: dict[UUID, RunningCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: RunningCall) -> None:
        self._calls[call.call_id] = call

    def remove(self, call: RunningCall) -> None:
        self._calls.pop(call.call_id, None)

    def get(self, call_id: UUID) -> RunningCall | None:
        return self._calls.get(call_id)

    def all(self) -> list[RunningCall]:
        return list(self._calls.values())
