"""What can be wrong with a memory or a job."""

from __future__ import annotations

from servicekit.core.errors import DomainError


class ItemNotFound(DomainError):
    """There is no such memory, or it is another user's."""

    reason = "MEMORY_ITEM_NOT_FOUND"


class ItemNotChangeable(DomainError):
    """The memory is in a state in which this can not be done."""

    reason = "MEMORY_ITEM_NOT_CHANGEABLE"


class VersionConflict(DomainError):
    """The memory was changed meanwhile."""

    reason = "MEMORY_VERSION_CONFLICT"


class JobNotFound(DomainError):
    """There is no such job, or it is another user's."""

    reason = "MEMORY_JOB_NOT_FOUND"


class JobNotRetryable(DomainError):
    """The job is done, or is being worked on."""

    reason = "MEMORY_JOB_NOT_RETRYABLE"


class TurnSealed(DomainError):
    """The turn is sealed under a key that this service does not have."""

    reason = "MEMORY_TURN_SEALED"


class DecisionNotFound(DomainError):
    """There is no such decision."""

    reason = "MEMORY_DECISION_NOT_FOUND"


class ContentRefused(DomainError):
    """What is to be remembered holds a secret."""

    reason = "MEMORY_CONTENT_REFUSED"
