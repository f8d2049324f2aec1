"""Which model server a call asks next: a small state machine without clock, network or chance of its own.

Lower `priority` first; within one priority the order is the caller's, drawn by weight. A server that failed before its
first token is asked again up to `max_retries` times, after a pause with full jitter or as long as it says itself, but
never while another of its priority can be asked at once; the next priority is the fallback. A pause that is longer than
PATIENCE_SECONDS is not waited for while there is a fallback. Nothing is begun that can not begin before the deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from llm_service.domain.deployment import Deployment

FIRST_PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 2.0
PATIENCE_SECONDS = 0.5
MOST_WAIT_SECONDS = 3.0
"""A server that says that it is to be asked again later than this is not waited for."""


class FailureKind(Enum):
    """What a failure before the first token means for the next attempt."""

    UNAVAILABLE = "unavailable"
    """It may work the next time, there or elsewhere."""
    SLOW = "slow"
    """It was silent for too long: not there again."""
    LIMITED = "limited"
    """It says that we ask too much: there again when it says so."""
    MISCONFIGURED = "misconfigured"
    """Our key or path is refused: never there again."""
    TOO_LONG = "too_long"
    """The prompt is longer than its window: only where the window is wider."""
    REJECTED = "rejected"
    """The request itself is refused: nowhere again."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this one now."""

    deployment: Deployment
    is_retry: bool
    is_fallback: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing can be asked before `until`."""

    until: float


@dataclass(frozen=True, slots=True)
class Stop:
    """There is nobody left to ask. `retry_after_seconds`: when it may be worth it, if anybody said."""

    retry_after_seconds: float | None = None


@dataclass(slots=True)
class _Candidate:
    deployment: Deployment
    tries: int = 0
    failures: int = 0
    not_before: float = 0.0
    is_out: bool = False
    is_busy: bool = False

    @property
    def has_tries_left(self) -> bool:
        return not self.is_out and self.failures <= self.deployment.max_retries


@dataclass(slots=True)
class Plan:
    """The attempts of one call. `tiers`: deployments by priority, each in the order to ask; `jitter()` is 0..1."""

    tiers: Sequence[Sequence[Deployment]]
    most_attempts: int
    jitter: Callable[[], float]
    asked: int = 0
    _candidates: list[list[_Candidate]] = field(init=False)
    _first: Deployment | None = None

    def __post_init__(self) -> None:
        self._candidates = [[_Candidate(each) for each in tier] for tier in self.tiers]

    def next(
        self, now: float, *, deadline: float | None, may_try: Callable[[Deployment], bool]
    ) -> Ask | Pause | Stop:
        """`may_try` tells of circuit breakers; times are on one monotonic clock."""
        if self.asked >= self.most_attempts or (deadline is not None and now >= deadline):
            return Stop(self._soonest(now))
        pauses: list[float] = []
        for tier in self._candidates:
            usable = [each for each in tier if each.has_tries_left and may_try(each.deployment)]
            ready = [each for each in usable if each.not_before <= now]
            if ready:
                return self._ask(min(ready, key=lambda each: each.failures))
            soon = [
                each.not_before for each in usable
                if each.not_before - now <= PATIENCE_SECONDS and not each.is_busy
            ]
            if soon and (deadline is None or min(soon) < deadline):
                return Pause(min(soon))
            pauses += [each.not_before for each in usable]
        waitable = [
            until for until in pauses
            if until - now <= MOST_WAIT_SECONDS and (deadline is None or until < deadline)
        ]
        return Pause(min(waitable)) if waitable else Stop(self._soonest(now))

    def failed(
        self, deployment: Deployment, kind: FailureKind, now: float, *, retry_after_seconds: float | None = None
    ) -> None:
        """What was asked failed before its first token."""
        everyone = [each for tier in self._candidates for each in tier]
        candidate = self._of(deployment)
        candidate.failures += 1
        if kind is FailureKind.REJECTED:
            for each in everyone:
                each.is_out = True
        elif kind is FailureKind.TOO_LONG:
            for each in everyone:
                each.is_out |= 0 < each.deployment.context_window <= deployment.context_window or each is candidate
        elif kind in (FailureKind.MISCONFIGURED, FailureKind.SLOW):
            candidate.is_out = True
        else:
            longest = min(MOST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (candidate.failures - 1))
            pause = longest * self.jitter()
            candidate.not_before = now + max(pause, retry_after_seconds or 0.0)

    def busy(self, deployment: Deployment, until: float) -> None:
        """A limit of ours holds it back until then; it was not asked."""
        self.asked -= 1
        candidate = self._of(deployment)
        candidate.tries -= 1
        candidate.is_busy = True
        candidate.not_before = max(candidate.not_before, until)

    def rest(self, deployment: Deployment, until: float) -> None:
        """Another call was told to ask it no sooner."""
        self._of(deployment).not_before = until

    def ask(self, deployment: Deployment) -> Ask:
        """It has a place now: ask it."""
        return self._ask(self._of(deployment))

    def _of(self, deployment: Deployment) -> _Candidate:
        return next(each for tier in self._candidates for each in tier if each.deployment is deployment)

    def another(self, deployment: Deployment, now: float, may_try: Callable[[Deployment], bool]) -> Deployment | None:
        """Who could be asked at once beside `deployment`."""
        for tier in self._candidates:
            for each in tier:
                usable = each.has_tries_left and each.not_before <= now and each.deployment is not deployment
                if usable and self.asked < self.most_attempts and may_try(each.deployment):
                    return self._ask(each).deployment
        return None

    def _ask(self, candidate: _Candidate) -> Ask:
        self.asked += 1
        if self._first is None:
            self._first = self._candidates[0][0].deployment
        is_retry = candidate.tries > 0
        candidate.tries += 1
        candidate.is_busy = False
        return Ask(candidate.deployment, is_retry, is_fallback=candidate.deployment is not self._first)

    def _soonest(self, now: float) -> float | None:
        waits = [
            each.not_before - now for tier in self._candidates for each in tier
            if not each.is_out and each.not_before > now
        ]
        return min(waits) if waits else None
