"""Calls <-> rows. Writes go as JSON: one parameter for a whole batch, whatever its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_service.domain.call import (
    Attempt,
    AttemptKind,
    Billing,
    CallRecord,
    CallState,
    Charge,
    ChargeStatus,
    Operation,
)
from llm_service.domain.chat import FinishReason
from metering.charge import Quote, Rates, numbers_of
from metering.usage import Usage, UsageSource


def call_to_row(record: CallRecord) -> dict[str, Any]:
    """Column name to JSON value."""
    billing, usage, quote, charge = record.billing, record.usage, record.quote, record.charge
    return {
        "user_id": billing.user_id, "call_id": record.call_id, "request_id": billing.request_id,
        "scene": billing.scene, "conversation_id": billing.conversation_id, "model": record.model,
        "provider": record.provider, "price_provider": record.price_provider, "upstream_model": record.upstream_model,
        "state": int(record.state), "streamed": record.streamed, "skip_charge": billing.skip_charge,
        "labels": billing.labels, "hold_micros": record.hold_micros, "max_output_tokens": record.max_output_tokens,
        "price_rule_id": quote.rule_id if quote else "", "price_rule_version": quote.version if quote else 0,
        "rates": numbers_of(quote.rates) if quote else None,
        "input_tokens": usage.input_tokens, "cached_input_tokens": usage.cached_input_tokens,
        "cache_write_tokens": usage.cache_write_tokens, "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens, "input_audio_tokens": usage.input_audio_tokens,
        "output_audio_tokens": usage.output_audio_tokens, "usage_source": int(usage.source),
        "finish_reason": int(record.finish_reason), "error_reason": record.error_reason,
        "credit_micros": charge.credit_micros if charge else None,
        "charge_status": int(charge.status) if charge else None, "swept": record.swept,
        "created_at": record.created_at, "first_token_at": record.first_token_at, "ended_at": record.ended_at,
        "operation": int(record.operation),
    }


def call_from_row(row: Mapping[str, Any], attempts: tuple[Attempt, ...] = ()) -> CallRecord:
    quote = None
    if row["rates"] is not None:
        quote = Quote(row["price_rule_id"], row["price_rule_version"], Rates(*row["rates"]))
    charge = None
    if row["charge_status"] is not None:
        charge = Charge(
            row["credit_micros"], ChargeStatus(row["charge_status"]), row["price_rule_id"], row["price_rule_version"]
        )
    return CallRecord(
        call_id=row["call_id"],
        billing=Billing(
            user_id=row["user_id"], request_id=row["request_id"], scene=row["scene"],
            conversation_id=row["conversation_id"], skip_charge=row["skip_charge"], labels=row["labels"],
        ),
        model=row["model"], provider=row["provider"], price_provider=row["price_provider"],
        upstream_model=row["upstream_model"], state=CallState(row["state"]), streamed=row["streamed"],
        hold_micros=row["hold_micros"], max_output_tokens=row["max_output_tokens"], quote=quote,
        usage=Usage(
            input_tokens=row["input_tokens"], cached_input_tokens=row["cached_input_tokens"],
            cache_write_tokens=row["cache_write_tokens"], output_tokens=row["output_tokens"],
            reasoning_tokens=row["reasoning_tokens"], input_audio_tokens=row["input_audio_tokens"],
            output_audio_tokens=row["output_audio_tokens"], source=UsageSource(row["usage_source"]),
        ),
        created_at=row["created_at"], finish_reason=FinishReason(row["finish_reason"]),
        error_reason=row["error_reason"], charge=charge, attempts=attempts, first_token_at=row["first_token_at"],
        ended_at=row["ended_at"], swept=row["swept"], operation=Operation(row["operation"]),
    )


def attempt_to_row(record: CallRecord, attempt: Attempt) -> dict[str, Any]:
    usage = attempt.usage
    return {
        "user_id": record.billing.user_id, "call_id": record.call_id, "number": attempt.number,
        "model_id": attempt.model_id, "provider": attempt.provider, "upstream_model": attempt.upstream_model,
        "error_reason": attempt.error_reason, "http_status": attempt.http_status, "started_at": attempt.started_at,
        "first_token_at": attempt.first_token_at, "ended_at": attempt.ended_at, "kind": int(attempt.kind),
        "usage": None if usage is None else [
            usage.input_tokens, usage.cached_input_tokens, usage.cache_write_tokens, usage.output_tokens,
            usage.reasoning_tokens, usage.input_audio_tokens, usage.output_audio_tokens, int(usage.source),
        ],
        "charged": attempt.charged, "upstream_finish_reason": attempt.upstream_finish_reason,
    }


def attempt_from_row(row: Mapping[str, Any]) -> Attempt:
    return Attempt(
        number=row["number"], model_id=row["model_id"], provider=row["provider"],
        upstream_model=row["upstream_model"], started_at=row["started_at"], first_token_at=row["first_token_at"],
        ended_at=row["ended_at"], error_reason=row["error_reason"], http_status=row["http_status"],
        kind=AttemptKind(row["kind"]),
        usage=_usage_from_row(row["usage"]) if row["usage"] else None,
        charged=row["charged"], upstream_finish_reason=row["upstream_finish_reason"],
    )


def _usage_from_row(numbers: Sequence[int]) -> Usage:
    plain, cached, written, output, reasoning, audio_in, audio_out, source = numbers
    return Usage(plain, cached, written, output, reasoning, audio_in, audio_out, UsageSource(source))
