"""Holds as they travel."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from creditmesh.tokenstore.v1 import hold_service_pb2
from google.protobuf.duration_pb2 import Duration

from metering.wire import quote_to_proto
from servicekit.core.errors import InvalidField
from servicekit.rpc.times import duration_from_proto, optional_timestamp_to_proto, timestamp_to_proto
from tokenstore_service.domain.commands import HoldChanged, HoldGranted, HoldRefused, OpenHold
from tokenstore_service.domain.hold import Hold
from tokenstore_service.wire.budgets import budget_to_proto

DEFAULT_SCENE = "chat"
DEFAULT_TTL = timedelta(seconds=60)


def ttl_from_proto(message: Duration | None) -> timedelta:
    return DEFAULT_TTL if message is None else duration_from_proto(message)


def open_hold_from_proto(message: hold_service_pb2.HoldRequest, *, index: int) -> OpenHold:
    """Raises InvalidField when min_output_tokens is above max_output_tokens."""
    if message.min_output_tokens > message.max_output_tokens:
        raise InvalidField.of(f"requests[{index}].min_output_tokens", "must not be above max_output_tokens")
    return OpenHold(
        hold_id=UUID(message.call_id), user_id=message.user_id, request_id=message.request_id,
        scene=message.scene or DEFAULT_SCENE, provider=message.provider, model=message.model,
        input_tokens=message.input_tokens, max_output_tokens=message.max_output_tokens,
        min_output_tokens=message.min_output_tokens,
        ttl=ttl_from_proto(message.ttl if message.HasField("ttl") else None),
        request_fingerprint=message.request_fingerprint, skip_charge=message.skip_charge, origin=message.origin,
        labels=dict(message.labels), other_providers=tuple(message.other_providers),
    )


def hold_result_to_proto(answer: HoldGranted | HoldRefused) -> hold_service_pb2.HoldResult:
    if isinstance(answer, HoldRefused):
        return hold_service_pb2.HoldResult(refused=hold_service_pb2.RefusedHold(
            reason=answer.reason, needed_micros=answer.needed_micros, available_micros=answer.available_micros,
            existing_call_id=answer.existing_call_id, budget=budget_to_proto(answer.budget) if answer.budget else None,
            resets_at=optional_timestamp_to_proto(answer.resets_at),
        ))
    hold = answer.hold
    return hold_service_pb2.HoldResult(granted=hold_service_pb2.GrantedHold(
        hold_id=str(hold.hold_id), held_micros=hold.held_micros, max_output_tokens=hold.max_output_tokens,
        quote=quote_to_proto(answer.quote) if answer.quote else None, expires_at=timestamp_to_proto(hold.expires_at),
        other_quotes={provider: quote_to_proto(quote) for provider, quote in answer.other_quotes.items()},
    ))


def hold_change_to_proto(answer: HoldChanged) -> hold_service_pb2.HoldChange:
    return hold_service_pb2.HoldChange(
        hold_id=str(answer.hold_id),
        state=hold_service_pb2.HoldState.ValueType(answer.state or 0),
        at=optional_timestamp_to_proto(answer.at),
    )


def hold_to_proto(hold: Hold) -> hold_service_pb2.Hold:
    return hold_service_pb2.Hold(
        hold_id=str(hold.hold_id), user_id=hold.user_id, request_id=hold.request_id, scene=hold.scene,
        provider=hold.provider, model=hold.model, held_micros=hold.held_micros, input_tokens=hold.input_tokens,
        max_output_tokens=hold.max_output_tokens, state=hold_service_pb2.HoldState.ValueType(hold.state),
        opened_at=timestamp_to_proto(hold.opened_at), expires_at=timestamp_to_proto(hold.expires_at),
        closed_at=optional_timestamp_to_proto(hold.closed_at), skip_charge=hold.skip_charge,
        origin=hold.origin,
    )
