"""The calls that run in this process, for heartbeats and for CancelCall."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

from llm_service.domain.call import Attempt, CallRecord
from llm_service.domain.chat import Answer
from llm_service.domain.deployment import Deployment
from metering.usage import Usage, UsageSource


@dataclass(slots=True)
class RunningCall:
    """A call while it runs. Times `*_seconds` are on the monotonic clock."""

    record: CallRecord
    deployment: Deployment
    input_tokens: int
    clipped: bool
    started_seconds: float
    hold_seconds: float
    hold_expires_at: datetime
    task: asyncio.Task[object] | None
    answer: Answer = field(default_factory=Answer)
    counted_output_tokens: int = 0
    usage: Usage | None = None
    upstream_model: str = ""
    reached_model: bool = False
    first_token_seconds: float | None = None
    first_token_at: datetime | None = None
    attempt_started_at: datetime | None = None
    http_status: int = 0
    error_reason: str = ""
    is_cancelled: bool = False
    is_waiting: bool = False
    is_ended: bool = False

    @property
    def call_id(self) -> UUID:
        return self.record.call_id

    @property
    def user_id(self) -> str:
        return self.record.billing.user_id

    def mark_sent(self) -> None:
        self.reached_model = True

    def cancel(self) -> None:
        """As if the client had left; the call is settled for what was delivered, and the client is told.

        The task is cancelled only while it waits for the model; elsewhere it looks at `is_cancelled` by itself.
        """
        if not self.is_ended and not self.is_cancelled:
            self.is_cancelled = True
            if self.is_waiting and self.task is not None:
                self.task.cancel()

    def checkpoint(self) -> CallRecord:
        """The record with the usage counted so far."""
        usage = Usage(
            input_tokens=self.input_tokens,
            output_tokens=min(self.counted_output_tokens, self.record.max_output_tokens),
            source=UsageSource.ESTIMATED,
        )
        return replace(
            self.record, usage=usage, upstream_model=self.upstream_model or self.record.upstream_model,
            first_token_at=self.first_token_at,
        )

    def attempt(self, *, ended_at: datetime) -> Attempt | None:
        if self.attempt_started_at is None:
            return None
        return Attempt(
            number=1, model_id=self.deployment.model_id, provider=self.deployment.provider.name,
            upstream_model=self.upstream_model or self.deployment.upstream_model,
            started_at=self.attempt_started_at, first_token_at=self.first_token_at, ended_at=ended_at,
            error_reason=self.error_reason, http_status=self.http_status,
        )


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
