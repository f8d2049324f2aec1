"""The events that llm_service sends."""

from __future__ import annotations

from creditmesh.events.v1 import charge_requested_pb2

from llm_service.domain.call import CallRecord
from metering.wire import quote_to_proto, usage_to_proto
from servicekit.rpc.times import timestamp_to_proto

CHARGE_REQUESTED = "credit.charge.requested"
CHARGES_TOPIC = "creditmesh.charges.v1"


def charge_event_id(record: CallRecord, *, corrects: bool) -> str:
    """The call id; a correction has an id of its own."""
    return f"correct:{record.call_id}" if corrects else str(record.call_id)


def charge_requested_to_bytes(record: CallRecord, *, corrects: bool = False) -> bytes:
    """The charge event of a settled call, or the one that corrects it."""
    billing = record.billing
    call_id = str(record.call_id)
    return charge_requested_pb2.ChargeRequested(
        event_id=charge_event_id(record, corrects=corrects), call_id=call_id, user_id=billing.user_id,
        request_id=billing.request_id,
        scene=billing.scene, provider=record.price_provider, model=record.model, usage=usage_to_proto(record.usage),
        quote=quote_to_proto(record.quote) if record.quote else None,
        occurred_at=timestamp_to_proto(record.ended_at or record.created_at), skip_charge=billing.skip_charge,
        conversation_id=billing.conversation_id, labels=billing.labels,
    ).SerializeToString()


def charge_requested_from_bytes(payload: bytes) -> charge_requested_pb2.ChargeRequested:
    return charge_requested_pb2.ChargeRequested.FromString(payload)
