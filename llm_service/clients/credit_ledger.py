"""TokenStore over gRPC: holds batched across concurrent calls, charges delivered by the relay."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

import grpc
import grpc.aio
from creditmesh.tokenstore.v1 import (
    budget_service_pb2,
    charge_service_pb2,
    charge_service_pb2_grpc,
    hold_service_pb2,
    hold_service_pb2_grpc,
)
from google.protobuf.duration_pb2 import Duration

from llm_service.usecases.ports import BindingBudget, ExpiredHold, HoldAsked, HoldGranted, HoldRefused
from llm_service.wire.events import charge_requested_from_bytes
from metering.wire import quote_from_proto
from servicekit.batching import MicroBatcher
from servicekit.core.errors import DependencyUnavailable
from servicekit.outbox.message import OutboxMessage
from servicekit.rpc.channel import TokenMetadata
from servicekit.rpc.times import timestamp_from_proto, timestamp_to_proto
from servicekit.telemetry import tracing
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

ORIGIN = "llm_service"
HOLD_SECONDS = 5.0
DELIVERY_SECONDS = 30.0
MOST_HOLDS = 500
LINGER_SECONDS = 0.002
PAGE_SIZE = 500
DEPENDENCY = "TokenStore"
OPEN_HOLDS = "creditmesh.tokenstore.v1.HoldService/OpenHolds"


class GrpcCreditLedger:
    """Implements CreditLedger."""

    def __init__(self, channel: grpc.aio.Channel, metadata: TokenMetadata, *, hold_ttl: timedelta) -> None:
        self._stub = hold_service_pb2_grpc.HoldServiceStub(channel)
        self._metadata = metadata
        self._ttl = Duration()
        self._ttl.FromTimedelta(hold_ttl)
        self._opening: MicroBatcher[tuple[HoldAsked, str], HoldGranted | HoldRefused] = MicroBatcher(
            self._open_holds, name="open-holds", most_items=MOST_HOLDS, linger_seconds=LINGER_SECONDS
        )
        self._releasing: MicroBatcher[tuple[str, UUID], None] = MicroBatcher(
            self._release_holds, name="release-holds", most_items=MOST_HOLDS
        )

    async def open_hold(self, asked: HoldAsked, *, traceparent: str = "") -> HoldGranted | HoldRefused:
        return await self._opening.submit((asked, traceparent))

    async def release_hold(self, user_id: str, call_id: UUID) -> None:
        await self._releasing.submit((user_id, call_id))

    async def extend_holds(self, holds: Sequence[tuple[str, UUID]]) -> None:
        for begin in range(0, len(holds), MOST_HOLDS):
            request = hold_service_pb2.ExtendHoldsRequest(holds=_keys(holds[begin:begin + MOST_HOLDS]), ttl=self._ttl)
            try:
                await self._stub.ExtendHolds(request, timeout=HOLD_SECONDS, metadata=self._metadata())
            except grpc.aio.AioRpcError as error:
                raise _unavailable(error) from error

    async def expired_holds(self, *, since: datetime) -> list[ExpiredHold]:
        found: list[ExpiredHold] = []
        request = hold_service_pb2.ListHoldsRequest(
            state=hold_service_pb2.HOLD_STATE_EXPIRED, page_size=PAGE_SIZE, origin=ORIGIN,
            closed_since=timestamp_to_proto(since),
        )
        while True:
            try:
                answer = await self._stub.ListHolds(request, timeout=HOLD_SECONDS, metadata=self._metadata())
            except grpc.aio.AioRpcError as error:
                raise _unavailable(error) from error
            found += [_expired_hold_from_proto(hold) for hold in answer.holds]
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    async def close(self) -> None:
        await self._opening.close()
        await self._releasing.close()

    async def _open_holds(
        self, asked: Sequence[tuple[HoldAsked, str]]
    ) -> Sequence[HoldGranted | HoldRefused | Exception]:
        request = hold_service_pb2.OpenHoldsRequest(requests=[self._hold_request(each) for each, _ in asked])
        metadata = self._metadata()
        span = None
        if traced := [traceparent for _, traceparent in asked if traceparent]:
            # One RPC serves several calls: it belongs to the first one's trace and is linked from the others.
            span = tracing.start(
                OPEN_HOLDS, kind=tracing.SpanKind.CLIENT, parent=traced[0], links=traced[1:], starts_trace=False,
                attributes={"rpc.system": "grpc", "rpc.method": OPEN_HOLDS, "creditmesh.holds": len(asked)},
            )
            metadata = (*metadata, *tracing.metadata_of(tracing.traceparent_of(span, traced[0])))
        try:
            answer = await self._stub.OpenHolds(request, timeout=HOLD_SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            tracing.end(span, error=error.code().name)
            raise _unavailable(error) from error
        tracing.end(span)
        asked_for = [each.provider for each, _ in asked]
        return [
            _hold_from_proto(result, provider) for result, provider in zip(answer.results, asked_for, strict=True)
        ]

    async def _release_holds(self, holds: Sequence[tuple[str, UUID]]) -> Sequence[None]:
        request = hold_service_pb2.ReleaseHoldsRequest(holds=_keys(holds))
        try:
            await self._stub.ReleaseHolds(request, timeout=HOLD_SECONDS, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            raise _unavailable(error) from error
        return [None] * len(holds)

    def _hold_request(self, asked: HoldAsked) -> hold_service_pb2.HoldRequest:
        billing = asked.billing
        return hold_service_pb2.HoldRequest(
            call_id=str(asked.call_id), user_id=billing.user_id, request_id=billing.request_id, scene=billing.scene,
            provider=asked.provider, model=asked.model, input_tokens=asked.input_tokens,
            max_output_tokens=asked.max_output_tokens, min_output_tokens=asked.min_output_tokens, ttl=self._ttl,
            request_fingerprint=billing.request_fingerprint, skip_charge=billing.skip_charge, origin=ORIGIN,
            labels=billing.labels, other_providers=asked.other_providers,
        )


class DirectChargeDelivery:
    """The relay's way to TokenStore when there is no Kafka: its idempotent RPC."""

    def __init__(self, channel: grpc.aio.Channel, metadata: TokenMetadata) -> None:
        self._stub = charge_service_pb2_grpc.ChargeServiceStub(channel)
        self._metadata = metadata

    async def publish(self, messages: Sequence[OutboxMessage]) -> Sequence[Exception | None]:
        request = charge_service_pb2.RecordChargesRequest(
            charges=[charge_requested_from_bytes(message.payload) for message in messages]
        )
        if any(message.traceparent for message in messages):
            request.traceparents.extend(message.traceparent for message in messages)
        try:
            answer = await self._stub.RecordCharges(request, timeout=DELIVERY_SECONDS, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT and len(messages) > 1:
                # One message spoils the request of all: let each stand for itself.
                return [await self._publish_one(message) for message in messages]
            raise _unavailable(error) from error
        for message, result in zip(messages, answer.results, strict=True):
            if result.status in (charge_service_pb2.RECORD_STATUS_CONFLICT, charge_service_pb2.RECORD_STATUS_REJECTED):
                log.error("charge_not_booked", event_id=message.event_id, detail=result.detail)
        return [None] * len(messages)

    async def _publish_one(self, message: OutboxMessage) -> Exception | None:
        try:
            await self.publish([message])
        except DependencyUnavailable as error:
            return error
        return None


def _keys(holds: Sequence[tuple[str, UUID]]) -> list[hold_service_pb2.HoldKey]:
    return [hold_service_pb2.HoldKey(user_id=user_id, hold_id=str(call_id)) for user_id, call_id in holds]


def _hold_from_proto(result: hold_service_pb2.HoldResult, provider: str) -> HoldGranted | HoldRefused:
    if result.HasField("refused"):
        refused = result.refused
        return HoldRefused(
            reason=refused.reason, needed_micros=refused.needed_micros, available_micros=refused.available_micros,
            existing_call_id=UUID(refused.existing_call_id) if refused.existing_call_id else None,
            budget=_budget_from_proto(refused) if refused.HasField("budget") else None,
        )
    granted = result.granted
    quotes = {provider: quote_from_proto(granted.quote)} if granted.HasField("quote") else {}
    for other, quote in granted.other_quotes.items():
        quotes[other] = quote_from_proto(quote)
    return HoldGranted(
        held_micros=granted.held_micros, max_output_tokens=granted.max_output_tokens, quotes=quotes,
        expires_at=timestamp_from_proto(granted.expires_at, field="expires_at"),
    )


def _budget_from_proto(refused: hold_service_pb2.RefusedHold) -> BindingBudget:
    budget = refused.budget
    return BindingBudget(
        budget_id=budget.budget_id, label_key=budget.label_key, label_value=budget.label_value,
        period=budget_service_pb2.Period.Name(budget.period).removeprefix("PERIOD_"), limit_micros=budget.limit_micros,
        resets_at=timestamp_from_proto(refused.resets_at, field="resets_at") if refused.HasField("resets_at") else None,
    )


def _expired_hold_from_proto(hold: hold_service_pb2.Hold) -> ExpiredHold:
    return ExpiredHold(
        call_id=UUID(hold.hold_id), user_id=hold.user_id, request_id=hold.request_id, scene=hold.scene,
        provider=hold.provider, model=hold.model, held_micros=hold.held_micros,
        max_output_tokens=hold.max_output_tokens, opened_at=timestamp_from_proto(hold.opened_at, field="opened_at"),
        closed_at=timestamp_from_proto(hold.closed_at, field="closed_at"),
    )


def _unavailable(error: grpc.aio.AioRpcError) -> DependencyUnavailable:
    """Whatever TokenStore answers to a well-formed request of ours, the call can not go on without it."""
    log.warning("tokenstore_failed", code=error.code().name, detail=error.details())
    return DependencyUnavailable(DEPENDENCY)
