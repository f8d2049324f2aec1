"""Why a call did not begin, or brought nothing, in the caller's words."""

from __future__ import annotations

from collections.abc import Mapping

from llm_service.domain.call import CallRecord
from llm_service.domain.errors import (
    BudgetExceeded,
    ContextTooLong,
    InsufficientCredit,
    RequestFinished,
    RequestInFlight,
    UpstreamRejected,
    UpstreamUnavailable,
)
from llm_service.usecases.ports import HoldAsked, HoldRefused, UpstreamFailure
from servicekit.core.errors import DomainError, IdempotencyConflict


def refusal(asked: HoldAsked, refused: HoldRefused) -> DomainError:
    existing: Mapping[str, str | int] = {"call_id": str(refused.existing_call_id)} if refused.existing_call_id else {}
    if refused.reason == "INSUFFICIENT_CREDIT":
        return InsufficientCredit(
            "the account does not have the credit that this call may need", user_id=asked.billing.user_id,
            needed_micros=refused.needed_micros, available_micros=refused.available_micros,
        )
    if refused.budget is not None:
        budget = refused.budget
        return BudgetExceeded(
            "a budget leaves less than this call may need", user_id=asked.billing.user_id, budget_id=budget.budget_id,
            label_key=budget.label_key, label_value=budget.label_value, period=budget.period,
            limit_micros=budget.limit_micros, needed_micros=refused.needed_micros,
            available_micros=refused.available_micros,
            resets_at=budget.resets_at.isoformat() if budget.resets_at else "never",
        )
    if refused.reason == "REQUEST_IN_FLIGHT":
        return RequestInFlight("the same request is still running", retry_after_seconds=1.0, facts=existing)
    if refused.reason == "REQUEST_FINISHED":
        return RequestFinished("this request was answered and charged", facts=existing)
    return IdempotencyConflict("the request_id was used before with other content", facts=existing)


def upstream_error(
    failure: UpstreamFailure | None, facts: Mapping[str, str | int], record: CallRecord
) -> DomainError:
    charged = record.charge.credit_micros if record.charge else 0
    cost = f"{charged} micro-credits were charged for attempts that are billed" if charged else "nothing was charged"
    if failure is None or failure.reason == "UPSTREAM_UNAVAILABLE":
        retry_after = failure.retry_after_seconds if failure and failure.retry_after_seconds else 1.0
        return UpstreamUnavailable(
            f"no model server answered; {cost}", retry_after_seconds=retry_after, facts=facts
        )
    if failure.reason == "CONTEXT_TOO_LONG":
        return ContextTooLong(f"the prompt does not fit the model's context window; {cost}", facts=facts)
    return UpstreamRejected(f"the model server refused the request; {cost}", facts=facts)
