"""What can be wrong with a call or a model."""

from __future__ import annotations

from servicekit.core.errors import DomainError


class ModelNotFound(DomainError):
    """There is no such model or alias."""

    reason = "MODEL_NOT_FOUND"


class ModelNotReady(DomainError):
    """The alias exists, but none of its models is active."""

    reason = "MODEL_NOT_READY"


class CallNotFound(DomainError):
    """There is no such call, or it is another user's."""

    reason = "CALL_NOT_FOUND"


class CallNotRunning(DomainError):
    """The call has ended."""

    reason = "CALL_NOT_RUNNING"


class RequestInFlight(DomainError):
    """The same request is still running."""

    reason = "REQUEST_IN_FLIGHT"


class RequestFinished(DomainError):
    """The request was answered and charged; its answer is no longer kept."""

    reason = "REQUEST_FINISHED"


class InsufficientCredit(DomainError):
    """The account does not have what the call would need."""

    reason = "INSUFFICIENT_CREDIT"


class BudgetExceeded(DomainError):
    """A spend cap of the user leaves less than the call may need."""

    reason = "BUDGET_EXCEEDED"


class RateLimited(DomainError):
    """A limit of the user or of every model of the alias is reached."""

    reason = "RATE_LIMITED"


class UpstreamRejected(DomainError):
    """The model server refused the request."""

    reason = "UPSTREAM_REJECTED"


class ContextTooLong(DomainError):
    """The prompt does not fit the model's context window."""

    reason = "CONTEXT_TOO_LONG"


class UpstreamUnavailable(DomainError):
    """The model server failed, was silent or limited us."""

    reason = "UPSTREAM_UNAVAILABLE"


class ConversationNotFound(DomainError):
    """There is no such conversation, or it is another user's."""

    reason = "CONVERSATION_NOT_FOUND"


class ConversationBusy(DomainError):
    """An answer is under way in this conversation."""

    reason = "CONVERSATION_BUSY"


class MessageNotFound(DomainError):
    """There is no such message in this conversation."""

    reason = "MESSAGE_NOT_FOUND"


class ToolResultsMissing(DomainError):
    """The newest message asks for tools, and their results are to be sent."""

    reason = "TOOL_RESULTS_MISSING"


class TooManyBranches(DomainError):
    """The conversation has no room for more branches."""

    reason = "TOO_MANY_BRANCHES"


class SecretKeyMissing(DomainError):
    """Keys of model servers can not be kept, because no key to seal them under is configured."""

    reason = "MODEL_NOT_READY"
