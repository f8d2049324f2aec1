"""Rates per minute by GCRA (ITU-T I.371): one number a limit, no window that opens all at once.

A limit of N a minute lets N come at once after a minute of rest, and then one each 60/N seconds. The Redis form of the
same rule is in clients/redis_limits.py.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What may run at once and per minute; 0 = not limited."""

    max_concurrency: int = 0
    rpm: int = 0
    tpm: int = 0

    def __bool__(self) -> bool:
        return bool(self.max_concurrency or self.rpm or self.tpm)


NO_LIMITS = Limits()


@dataclass(slots=True)
class Gcra:
    """`arrival` is the theoretical arrival time: when everything taken so far would be earned back."""

    per_minute: int
    arrival: float = 0.0

    def wait_seconds(self, cost: int, now: float) -> float:
        """0 = `cost` may be taken now. A cost above the whole minute's waits for a full minute's rest, then passes."""
        seconds = min(cost, self.per_minute) * SECONDS_PER_MINUTE / self.per_minute
        return max(0.0, max(self.arrival, now) + seconds - now - SECONDS_PER_MINUTE)

    def take(self, cost: int, now: float) -> None:
        self.arrival = max(self.arrival, now) + cost * SECONDS_PER_MINUTE / self.per_minute

    def give_back(self, cost: int) -> None:
        """Less was used than taken; negative = more."""
        self.arrival -= cost * SECONDS_PER_MINUTE / self.per_minute


@dataclass(slots=True)
class LimitState:
    """One subject's limits in one process."""

    limits: Limits
    running: int = 0
    requests: Gcra | None = None
    tokens: Gcra | None = None

    def __post_init__(self) -> None:
        self.requests = Gcra(self.limits.rpm) if self.limits.rpm else None
        self.tokens = Gcra(self.limits.tpm) if self.limits.tpm else None

    def try_take(self, tokens: int, now: float) -> float:
        """Takes a place, a request and tokens, all or nothing. Answers 0, or after how many seconds it is worth asking
        again; a place is free when somebody leaves, which nobody knows: 0.05."""
        if self.limits.max_concurrency and self.running >= self.limits.max_concurrency:
            return 0.05
        wait = max(
            self.requests.wait_seconds(1, now) if self.requests else 0.0,
            self.tokens.wait_seconds(tokens, now) if self.tokens else 0.0,
        )
        if wait > 0:
            return wait
        self.running += 1
        if self.requests:
            self.requests.take(1, now)
        if self.tokens:
            self.tokens.take(tokens, now)
        return 0.0

    def leave(self, unused_tokens: int) -> None:
        self.running -= 1
        if self.tokens:
            self.tokens.give_back(unused_tokens)
