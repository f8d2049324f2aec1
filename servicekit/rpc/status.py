"""The one table from reasons to gRPC codes, and the google.rpc.Status of an error."""

from __future__ import annotations

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import StatusCode

from servicekit.core.errors import DomainError

DOMAIN = "creditmesh"

CODE_OF_REASON: dict[str, StatusCode] = {
    "INVALID_FIELD": StatusCode.INVALID_ARGUMENT,
    "IDEMPOTENCY_CONFLICT": StatusCode.ALREADY_EXISTS,
    "REQUEST_IN_FLIGHT": StatusCode.ABORTED,
    "REQUEST_FINISHED": StatusCode.ALREADY_EXISTS,
    "INSUFFICIENT_CREDIT": StatusCode.RESOURCE_EXHAUSTED,
    "RATE_LIMITED": StatusCode.RESOURCE_EXHAUSTED,
    "MODEL_NOT_FOUND": StatusCode.NOT_FOUND,
    "MODEL_NOT_READY": StatusCode.FAILED_PRECONDITION,
    "CALL_NOT_FOUND": StatusCode.NOT_FOUND,
    "CALL_NOT_RUNNING": StatusCode.FAILED_PRECONDITION,
    "HOLD_NOT_FOUND": StatusCode.NOT_FOUND,
    "HOLD_NOT_OPEN": StatusCode.FAILED_PRECONDITION,
    "TRANSACTION_NOT_FOUND": StatusCode.NOT_FOUND,
    "PRICE_RULE_NOT_FOUND": StatusCode.NOT_FOUND,
    "NO_PRICE": StatusCode.FAILED_PRECONDITION,
    "AMOUNT_OUT_OF_RANGE": StatusCode.FAILED_PRECONDITION,
    "UPSTREAM_REJECTED": StatusCode.FAILED_PRECONDITION,
    "CONTEXT_TOO_LONG": StatusCode.INVALID_ARGUMENT,
    "UPSTREAM_UNAVAILABLE": StatusCode.UNAVAILABLE,
    "DEPENDENCY_UNAVAILABLE": StatusCode.UNAVAILABLE,
    "OVERLOADED": StatusCode.UNAVAILABLE,
    "UNAUTHENTICATED": StatusCode.UNAUTHENTICATED,
    "PERMISSION_DENIED": StatusCode.PERMISSION_DENIED,
    "DEADLINE_EXCEEDED": StatusCode.DEADLINE_EXCEEDED,
    "CANCELLED": StatusCode.CANCELLED,
    "INTERNAL": StatusCode.INTERNAL,
    "BUDGET_EXCEEDED": StatusCode.RESOURCE_EXHAUSTED,
    "TRANSACTION_NOT_REVERSIBLE": StatusCode.FAILED_PRECONDITION,
    "PRICE_RULE_OVERLAP": StatusCode.FAILED_PRECONDITION,
    "PRODUCT_NOT_FOUND": StatusCode.NOT_FOUND,
    "PRODUCT_NOT_AVAILABLE": StatusCode.FAILED_PRECONDITION,
    "PURCHASE_LIMIT_REACHED": StatusCode.RESOURCE_EXHAUSTED,
    "ORDER_NOT_FOUND": StatusCode.NOT_FOUND,
    "ORDER_NOT_PAYABLE": StatusCode.FAILED_PRECONDITION,
    "ORDER_NOT_REFUNDABLE": StatusCode.FAILED_PRECONDITION,
    "PAYMENT_REFUSED": StatusCode.PERMISSION_DENIED,
    "REWARD_RULE_NOT_FOUND": StatusCode.NOT_FOUND,
    "BUDGET_NOT_FOUND": StatusCode.NOT_FOUND,
    "CHARGE_ISSUE_NOT_FOUND": StatusCode.NOT_FOUND,
    "CHARGE_ISSUE_NOT_RESOLVABLE": StatusCode.FAILED_PRECONDITION,
    "CONVERSATION_NOT_FOUND": StatusCode.NOT_FOUND,
    "CONVERSATION_BUSY": StatusCode.ABORTED,
    "MESSAGE_NOT_FOUND": StatusCode.NOT_FOUND,
    "TOOL_RESULTS_MISSING": StatusCode.FAILED_PRECONDITION,
    "TOO_MANY_BRANCHES": StatusCode.FAILED_PRECONDITION,
    "MEMORY_ITEM_NOT_FOUND": StatusCode.NOT_FOUND,
    "MEMORY_ITEM_NOT_CHANGEABLE": StatusCode.FAILED_PRECONDITION,
    "MEMORY_VERSION_CONFLICT": StatusCode.ABORTED,
    "MEMORY_JOB_NOT_FOUND": StatusCode.NOT_FOUND,
    "MEMORY_JOB_NOT_RETRYABLE": StatusCode.FAILED_PRECONDITION,
    "MEMORY_DECISION_NOT_FOUND": StatusCode.NOT_FOUND,
    "MEMORY_CONTENT_REFUSED": StatusCode.FAILED_PRECONDITION,
    "MEMORY_TURN_SEALED": StatusCode.FAILED_PRECONDITION,
}

MOST_VIOLATIONS = 10
MOST_FIELD = 100
MOST_TEXT = 200
"""A status travels in trailers, which clients bound at 8 KiB and more; what a caller sent may be quoted in it."""

QUOTA_REASONS = frozenset({"INSUFFICIENT_CREDIT", "RATE_LIMITED", "BUDGET_EXCEEDED", "PURCHASE_LIMIT_REACHED"})


def _packed(message: object) -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(message)  # type: ignore[arg-type]  # google.rpc ships no types
    return detail


def status_of(error: DomainError, *, request_id: str) -> status_pb2.Status:
    """What the client is told: code, text, ErrorInfo always, and what else its reason calls for."""
    code = CODE_OF_REASON[error.reason]
    metadata = {key: value[:MOST_TEXT] for key, value in {**error.metadata, "request_id": request_id}.items()}
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))]
    if error.violations:
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=violation.field[:MOST_FIELD], description=violation.description[:MOST_TEXT]
            )
            for violation in error.violations[:MOST_VIOLATIONS]
        ])))
    if error.reason in QUOTA_REASONS:
        subject = f"user:{error.metadata['user_id']}" if "user_id" in error.metadata else DOMAIN
        details.append(_packed(error_details_pb2.QuotaFailure(violations=[
            error_details_pb2.QuotaFailure.Violation(subject=subject, description=error.message[:MOST_TEXT])
        ])))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_pb2.Code.Value(code.name), message=error.message[:MOST_TEXT], details=details)


def error_info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    """The ErrorInfo in a status, or None."""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info
    return None
