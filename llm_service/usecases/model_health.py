"""How each model server is doing, as far as this process has seen: its circuit breaker and its requests for a rest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from llm_service.domain.breaker import Breaker, BreakerState
from llm_service.domain.deployment import Deployment
from llm_service.domain.routing import FailureKind
from servicekit.core.clock import Clock

LONGEST_REST_SECONDS = 60.0
_TELLS_NOTHING = frozenset({FailureKind.REJECTED, FailureKind.TOO_LONG, FailureKind.LIMITED})


class ModelHealth:
    """A changed model begins anew: its key or address may be what was wrong."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._breakers: dict[str, tuple[datetime | None, Breaker]] = {}
        self._rest_until: dict[str, float] = {}

    def may_try(self, deployment: Deployment) -> bool:
        now = self._clock.monotonic()
        known = self._breakers.get(deployment.model_id)
        return known is None or known[0] != deployment.updated_at or known[1].may_try(now)

    def resting(self, tiers: Sequence[Sequence[Deployment]]) -> list[tuple[Deployment, float]]:
        """Which of them said that they want to be asked later, and when."""
        if not self._rest_until:
            return []
        now = self._clock.monotonic()
        return [
            (each, until) for tier in tiers for each in tier
            if (until := self._rest_until.get(each.model_id, 0.0)) > now
        ]

    def retry_after(self, tiers: Sequence[Sequence[Deployment]]) -> float | None:
        """When the first of their breakers lets a call try again."""
        now = self._clock.monotonic()
        waits = [
            known[1].open_until - now for tier in tiers for each in tier
            if (known := self._breakers.get(each.model_id)) is not None and known[1].open_until > now
        ]
        return min(waits) if waits else None

    def begin(self, deployment: Deployment) -> bool:
        """Answers whether the attempt is a probe; give it back to `end`."""
        known = self._breakers.get(deployment.model_id)
        return known is not None and known[0] == deployment.updated_at and known[1].begin(self._clock.monotonic())

    def end(
        self, deployment: Deployment, failure: FailureKind | None, *, was_probe: bool,
        tells_nothing: bool = False, retry_after_seconds: float | None = None,
    ) -> None:
        known = self._breakers.get(deployment.model_id)
        if failure is None and known is None:
            return
        if known is None or known[0] != deployment.updated_at:
            known = self._breakers[deployment.model_id] = (deployment.updated_at, Breaker())
        failed: bool | None = failure is not None
        if tells_nothing or failure in _TELLS_NOTHING:
            failed = None
        now = self._clock.monotonic()
        known[1].end(now, failed=failed, was_probe=was_probe)
        if failure is FailureKind.LIMITED and retry_after_seconds:
            self._rest_until[deployment.model_id] = now + min(retry_after_seconds, LONGEST_REST_SECONDS)

    def state(self, deployment: Deployment) -> BreakerState:
        known = self._breakers.get(deployment.model_id)
        if known is None or known[0] != deployment.updated_at:
            return BreakerState.CLOSED
        return known[1].state(self._clock.monotonic())
