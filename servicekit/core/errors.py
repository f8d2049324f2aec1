"""Errors that cross layers. Each carries a stable reason; `servicekit.rpc.status` maps reasons to gRPC codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request."""

    field: str
    description: str


class DomainError(Exception):
    """Something that the caller is told about, with a reason and the facts behind it."""

    reason = "INTERNAL"

    def __init__(
        self, message: str, *, retry_after_seconds: float | None = None, violations: Sequence[FieldViolation] = (),
        facts: Mapping[str, str | int] | None = None, **metadata: str | int,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.violations = tuple(violations)
        self.metadata = {key: str(value) for key, value in {**(facts or {}), **metadata}.items()}


class InvalidField(DomainError):
    """A field is missing or malformed."""

    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, field: str, description: str) -> InvalidField:
        return cls(f"{field}: {description}", violations=[FieldViolation(field, description)])


class IdempotencyConflict(DomainError):
    """The idempotency key was used before with other content."""

    reason = "IDEMPOTENCY_CONFLICT"


class Unauthenticated(DomainError):
    """There is no valid service token."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(DomainError):
    """The token lacks the scope."""

    reason = "PERMISSION_DENIED"


class DependencyUnavailable(DomainError):
    """Something that this service needs is down."""

    reason = "DEPENDENCY_UNAVAILABLE"

    def __init__(self, dependency: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(
            f"{dependency} is not reachable", retry_after_seconds=retry_after_seconds, dependency=dependency
        )


class Overloaded(DomainError):
    """This replica is draining or its queue is full."""

    reason = "OVERLOADED"

    def __init__(self, message: str = "this replica takes no more work now") -> None:
        super().__init__(message, retry_after_seconds=0.5)


class DeadlineExceeded(DomainError):
    """The caller's deadline passed."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(DomainError):
    """The caller ended the call."""

    reason = "CANCELLED"
