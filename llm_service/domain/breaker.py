"""A circuit breaker: a model server that keeps failing is left alone for a while, then tried by one call at a time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum


class BreakerState(IntEnum):
    """Numbers as the metric shows them."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """Opens after `most_failures` in a row, or when at least `least_calls` of the last `window_seconds` failed to
    `failure_share`; closed for `rest_seconds`, twice as long each time a probe fails, up to `most_rest_seconds`."""

    most_failures: int = 5
    least_calls: int = 20
    failure_share: float = 0.5
    window_seconds: float = 30.0
    rest_seconds: float = 2.0
    most_rest_seconds: float = 60.0


DEFAULT_POLICY = BreakerPolicy()
MOST_REMEMBERED = 200


@dataclass(slots=True)
class Breaker:
    """Of one model server. Times are seconds on one monotonic clock."""

    policy: BreakerPolicy = DEFAULT_POLICY
    failures_in_a_row: int = 0
    open_until: float = 0.0
    rest_seconds: float = 0.0
    is_probing: bool = False
    _recent: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=MOST_REMEMBERED))

    def state(self, now: float) -> BreakerState:
        if not self.rest_seconds:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.open_until else BreakerState.HALF_OPEN

    def may_try(self, now: float) -> bool:
        """Whether a call may go there: any while closed, one at a time while half open."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self.is_probing)

    def begin(self, now: float) -> bool:
        """A call goes there. Answers whether it is a probe; give the answer back to `end`."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self.is_probing = True
            return True
        return False

    def end(self, now: float, *, failed: bool | None, was_probe: bool) -> None:
        """A call came back; `failed` None = it tells nothing of the server (its client left, its input was bad)."""
        if was_probe:
            self.is_probing = False
        if failed is None:
            return
        if not failed:
            self.failures_in_a_row = 0
            if was_probe or not self.rest_seconds:
                self.rest_seconds = 0.0
                self.open_until = 0.0
            if self._recent:
                self._recent.append((now, False))
            return
        self.failures_in_a_row += 1
        self._recent.append((now, True))
        if was_probe:
            self._open(now, min(self.rest_seconds * 2, self.policy.most_rest_seconds))
        elif not self.rest_seconds and self._has_failed_enough(now):
            self._open(now, self.policy.rest_seconds)

    def _has_failed_enough(self, now: float) -> bool:
        if self.failures_in_a_row >= self.policy.most_failures:
            return True
        recent = [failed for at, failed in self._recent if at > now - self.policy.window_seconds]
        return len(recent) >= self.policy.least_calls and sum(recent) >= len(recent) * self.policy.failure_share

    def _open(self, now: float, seconds: float) -> None:
        self.rest_seconds = seconds
        self.open_until = now + seconds
        self.failures_in_a_row = 0
        self._recent.clear()
