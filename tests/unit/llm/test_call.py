"""How each end of a call is settled."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest

from llm_service.domain.call import (
    Billing,
    CallRecord,
    CallState,
    ChargeStatus,
    End,
    judge,
    price,
    settle,
    sweep,
)
from llm_service.domain.chat import FinishReason
from metering.charge import Quote, Rates
from metering.usage import Usage, UsageSource

NOW = datetime(2026, 6, 1, tzinfo=UTC)
QUOTE = Quote("default", 1, Rates(input_pico=320_000_000, output_pico=1_600_000_000))
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def record(**fields: object) -> CallRecord:
    values: dict[str, object] = {
        "call_id": UUID(int=1), "billing": Billing("u", "r", "chat"), "model": "pro", "provider": "LOCAL",
        "price_provider": "LOCAL", "upstream_model": "local", "state": CallState.RUNNING, "streamed": True,
        "hold_micros": 100, "max_output_tokens": 50, "quote": QUOTE, "usage": Usage(), "created_at": NOW, **fields,
    }
    return CallRecord(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("end", "finish", "reached", "delivered", "clipped", "charged", "told"), [
    (End.COMPLETED, STOP, True, True, False, True, STOP),
    (End.COMPLETED, STOP, True, False, True, True, STOP),
    (End.COMPLETED, LENGTH, True, True, False, True, LENGTH),
    (End.COMPLETED, LENGTH, True, True, True, True, FinishReason.CREDIT_EXHAUSTED),
    (End.CUT, STOP, True, True, True, True, FinishReason.CREDIT_EXHAUSTED),
    (End.CUT, STOP, True, True, False, True, LENGTH),
    (End.CLIENT_GONE, STOP, True, True, False, True, FinishReason.CANCELLED),
    (End.CLIENT_GONE, STOP, True, False, False, True, FinishReason.CANCELLED),
    (End.CLIENT_GONE, STOP, False, False, False, False, FinishReason.CANCELLED),
    (End.DEADLINE, STOP, True, False, False, True, FinishReason.DEADLINE),
    (End.DEADLINE, STOP, False, False, False, False, FinishReason.DEADLINE),
    (End.MODEL_TIMEOUT, STOP, True, True, False, True, FinishReason.DEADLINE),
    (End.MODEL_TIMEOUT, STOP, True, False, False, False, FinishReason.UPSTREAM_ERROR),
    (End.UPSTREAM_FAILED, STOP, True, True, False, True, FinishReason.UPSTREAM_ERROR),
    (End.UPSTREAM_FAILED, STOP, True, False, False, False, FinishReason.UPSTREAM_ERROR),
])
def test_what_was_delivered_is_charged_and_what_never_reached_a_model_is_not(
    end: End, finish: FinishReason, reached: bool, delivered: bool, clipped: bool, charged: bool, told: FinishReason
) -> None:
    verdict = judge(
        end, finish_reason=finish, reached_model=reached, delivered=delivered, clipped=clipped, error_reason="X"
    )
    assert (verdict.charged, verdict.finish_reason) == (charged, told)


def test_a_charge_says_what_became_of_it() -> None:
    usage = Usage(input_tokens=10, output_tokens=20)
    assert price(usage, QUOTE, skip_charge=False).credit_micros == 35_200
    assert price(usage, QUOTE, skip_charge=False).status is ChargeStatus.CHARGED
    assert price(usage, QUOTE, skip_charge=True).status is ChargeStatus.SKIPPED
    assert price(usage, None, skip_charge=False).status is ChargeStatus.UNPRICED
    assert price(Usage(), QUOTE, skip_charge=False).status is ChargeStatus.FREE


def test_an_uncharged_end_keeps_no_usage_and_no_charge() -> None:
    verdict = judge(
        End.UPSTREAM_FAILED, finish_reason=STOP, reached_model=True, delivered=False, clipped=False,
        error_reason="UPSTREAM_UNAVAILABLE",
    )
    ended = settle(record(), verdict, Usage(input_tokens=5), at=NOW)
    assert (ended.state, ended.charge, ended.usage.input_tokens) == (CallState.FAILED, None, 0)
    assert ended.error_reason == "UPSTREAM_UNAVAILABLE"


def test_a_swept_call_is_charged_by_its_checkpoint_or_unknown() -> None:
    swept = sweep(record(usage=Usage(input_tokens=10, output_tokens=20)), at=NOW)
    assert (swept.state, swept.swept, swept.usage.source) == (CallState.SETTLED, True, UsageSource.ESTIMATED)
    assert swept.charge is not None
    assert swept.charge.credit_micros == 35_200
    unknown = sweep(record(usage=Usage(input_tokens=10)), at=NOW)
    assert (unknown.state, unknown.charge, unknown.swept) == (CallState.UNKNOWN_OUTCOME, None, True)
