"""Calls as they travel."""

from __future__ import annotations

import hashlib

from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import call_pb2, chat_pb2, llm_service_pb2

from llm_service.domain.call import Attempt, Billing, CallRecord, Charge
from llm_service.domain.chat import Prompt
from llm_service.usecases.call_events import CallRequest, Finished, Generated, Started, Timing
from llm_service.wire.chat import (
    AnyCallRequest,
    message_to_proto,
    output_tokens_from_proto,
    prompt_from_proto,
    vectors_to_proto,
)
from metering.wire import usage_to_proto
from servicekit.core.ids import IdSource
from servicekit.rpc.times import duration_to_proto, optional_timestamp_to_proto, timestamp_to_proto

DEFAULT_SCENE = "chat"
EMBED_SCENE = "embed"


def call_request_from_proto(
    request: AnyCallRequest, *, deadline_seconds: float | None, traceparent: str, ids: IdSource
) -> CallRequest:
    """Raises InvalidField."""
    most, least = output_tokens_from_proto(request)
    return CallRequest(
        billing=_billing_from_proto(request, ids=ids), model=request.model, prompt=prompt_from_proto(request),
        max_output_tokens=most, min_output_tokens=least, deadline_seconds=deadline_seconds,
        store=not request.HasField("store") or request.store, traceparent=traceparent,
    )


def embed_request_from_proto(
    request: llm_service_pb2.EmbedRequest, *, deadline_seconds: float | None, traceparent: str, ids: IdSource
) -> CallRequest:
    return CallRequest(
        billing=_billing_from_proto(request, ids=ids, scene=EMBED_SCENE), model=request.model, prompt=Prompt(()),
        max_output_tokens=None, min_output_tokens=0, deadline_seconds=deadline_seconds,
        store=not request.HasField("store") or request.store, inputs=tuple(request.inputs),
        dimensions=request.dimensions if request.HasField("dimensions") else None, traceparent=traceparent,
    )


def _billing_from_proto(
    request: AnyCallRequest | llm_service_pb2.EmbedRequest, *, ids: IdSource, scene: str = DEFAULT_SCENE
) -> Billing:
    billing = request.billing
    return Billing(
        user_id=billing.user_id, request_id=billing.request_id or str(ids.new_id()),
        scene=billing.scene or scene, conversation_id=billing.conversation_id,
        skip_charge=billing.skip_charge, labels=dict(billing.labels),
        # Without a request_id nothing can be repeated, and nothing needs comparing.
        request_fingerprint=_fingerprint(request) if billing.request_id else b"",
        request_id_was_given=bool(billing.request_id),
    )


def _fingerprint(request: AnyCallRequest | llm_service_pb2.EmbedRequest) -> bytes:
    """Generate and Stream have the same fields, so that either may repeat the other."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def charge_to_proto(charge: Charge, *, hold_id: str) -> billing_pb2.Charge:
    return billing_pb2.Charge(
        credit_micros=charge.credit_micros, price_rule_id=charge.price_rule_id,
        price_rule_version=charge.price_rule_version, hold_id=hold_id,
        status=billing_pb2.ChargeStatus.ValueType(charge.status),
    )


def _charge_of(record: CallRecord) -> billing_pb2.Charge | None:
    return charge_to_proto(record.charge, hold_id=str(record.call_id)) if record.charge else None


def started_to_proto(started: Started) -> llm_service_pb2.StreamResponse:
    record = started.record
    return llm_service_pb2.StreamResponse(started=llm_service_pb2.Started(
        call_id=str(record.call_id), request_id=record.billing.request_id, model=record.model,
        hold_micros=record.hold_micros, max_output_tokens=record.max_output_tokens, provider=record.provider,
        replayed=started.replayed,
    ))


def finished_to_proto(finished: Finished) -> llm_service_pb2.StreamResponse:
    record = finished.record
    return llm_service_pb2.StreamResponse(finished=llm_service_pb2.Finished(
        finish_reason=chat_pb2.FinishReason.ValueType(record.finish_reason), usage=usage_to_proto(record.usage),
        charge=_charge_of(record), upstream_model=record.upstream_model, timing=_timing_to_proto(finished.timing),
        attempts=len(record.attempts), fallback=finished.fallback, metadata=finished.metadata,
    ))


def _timing_to_proto(timing: Timing) -> llm_service_pb2.Timing:
    return llm_service_pb2.Timing(
        hold=duration_to_proto(timing.hold),
        first_token=None if timing.first_token is None else duration_to_proto(timing.first_token),
        total=duration_to_proto(timing.total), queue=duration_to_proto(timing.queue),
    )


def generated_to_proto(generated: Generated) -> llm_service_pb2.GenerateResponse:
    record = generated.record
    return llm_service_pb2.GenerateResponse(
        call_id=str(record.call_id), request_id=record.billing.request_id, model=record.model,
        upstream_model=record.upstream_model,
        outputs=[llm_service_pb2.Output(
            index=0, message=message_to_proto(generated.message),
            finish_reason=chat_pb2.FinishReason.ValueType(record.finish_reason),
        )],
        usage=usage_to_proto(record.usage), charge=_charge_of(record), replayed=generated.replayed,
        attempts=len(record.attempts), fallback=generated.fallback, metadata=generated.metadata,
        timing=_timing_to_proto(generated.timing) if generated.timing else None,
    )


def embedded_to_proto(generated: Generated) -> llm_service_pb2.EmbedResponse:
    record = generated.record
    return llm_service_pb2.EmbedResponse(
        call_id=str(record.call_id), embeddings=vectors_to_proto(generated.vectors), usage=usage_to_proto(record.usage),
        charge=_charge_of(record), request_id=record.billing.request_id, model=record.model,
        upstream_model=record.upstream_model, replayed=generated.replayed,
    )


def call_to_proto(record: CallRecord) -> call_pb2.Call:
    return call_pb2.Call(
        call_id=str(record.call_id), user_id=record.billing.user_id, request_id=record.billing.request_id,
        scene=record.billing.scene, conversation_id=record.billing.conversation_id, model=record.model,
        provider=record.provider, upstream_model=record.upstream_model,
        state=call_pb2.CallState.ValueType(record.state),
        finish_reason=chat_pb2.FinishReason.ValueType(record.finish_reason), error_reason=record.error_reason,
        usage=usage_to_proto(record.usage), charge=_charge_of(record),
        attempts=[_attempt_to_proto(attempt) for attempt in record.attempts], hold_micros=record.hold_micros,
        max_output_tokens=record.max_output_tokens, streamed=record.streamed,
        created_at=timestamp_to_proto(record.created_at),
        first_token_at=optional_timestamp_to_proto(record.first_token_at),
        ended_at=optional_timestamp_to_proto(record.ended_at), swept=record.swept,
        operation=call_pb2.Operation.ValueType(record.operation),
    )


def _attempt_to_proto(attempt: Attempt) -> call_pb2.Attempt:
    return call_pb2.Attempt(
        number=attempt.number, model_id=attempt.model_id, provider=attempt.provider,
        upstream_model=attempt.upstream_model, error_reason=attempt.error_reason, http_status=attempt.http_status,
        started_at=timestamp_to_proto(attempt.started_at),
        first_token_at=optional_timestamp_to_proto(attempt.first_token_at),
        ended_at=optional_timestamp_to_proto(attempt.ended_at), kind=call_pb2.AttemptKind.ValueType(attempt.kind),
        usage=usage_to_proto(attempt.usage) if attempt.usage else None, charged=attempt.charged,
        upstream_finish_reason=attempt.upstream_finish_reason,
    )
