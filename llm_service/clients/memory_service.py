"""The memory service over gRPC: memories for a prompt, within a short time or not at all; and finished turns."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio
from creditmesh.memory.v1 import memory_pb2, memory_service_pb2, memory_service_pb2_grpc

from llm_service.usecases.conversation_ports import Memory
from llm_service.wire.events import TURN_COMPLETED, turn_completed_from_bytes
from servicekit.core.errors import DependencyUnavailable
from servicekit.outbox.message import OutboxMessage, Publisher
from servicekit.rpc.channel import TokenMetadata
from servicekit.telemetry import tracing
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

DELIVERY_SECONDS = 10.0
MOST_QUERY_BYTES = 8192
LIMIT = 8
TOKEN_BUDGET = 800
DEPENDENCY = "the memory service"


class GrpcMemories:
    """Implements Memories. After `seconds` the answer is given without."""

    def __init__(self, channel: grpc.aio.Channel, token: TokenMetadata, *, seconds: float) -> None:
        self._stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
        self._token = token
        self._seconds = seconds

    async def retrieve(self, user_id: str, query: str, *, traceparent: str) -> list[Memory] | None:
        request = memory_service_pb2.RetrieveRequest(
            user_id=user_id, query=query.encode()[:MOST_QUERY_BYTES].decode(errors="ignore"), limit=LIMIT,
            token_budget=TOKEN_BUDGET,
        )
        metadata = self._token()
        if traceparent:
            metadata = (*metadata, *tracing.metadata_of(traceparent))
        try:
            answer = await self._stub.Retrieve(request, timeout=self._seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            log.warning("memories_unavailable", code=error.code().name)
            return None
        return [
            Memory(each.item.item_id, memory_pb2.MemoryType.Name(each.item.type).removeprefix("MEMORY_TYPE_").lower(),
                   each.item.content)
            for each in answer.items
        ]


class DirectTurnDelivery:
    """The relay's way to the memory service when there is no Kafka: its idempotent RPC."""

    def __init__(self, channel: grpc.aio.Channel, token: TokenMetadata) -> None:
        self._stub = memory_service_pb2_grpc.MemoryServiceStub(channel)
        self._token = token

    async def publish(self, messages: Sequence[OutboxMessage]) -> Sequence[Exception | None]:
        request = memory_service_pb2.SubmitTurnsRequest(
            turns=[turn_completed_from_bytes(message.payload) for message in messages]
        )
        try:
            await self._stub.SubmitTurns(request, timeout=DELIVERY_SECONDS, metadata=self._token())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                if len(messages) == 1:
                    log.error("turn_refused", event_id=messages[0].event_id)  # it never will be taken
                    return [None]
                return [(await self.publish([message]))[0] for message in messages]
            raise DependencyUnavailable(DEPENDENCY) from error
        return [None] * len(messages)


class DirectDelivery:
    """Takes each event to whom it is for. The memory service's troubles do not hold up a charge."""

    def __init__(self, charges: Publisher, turns: Publisher) -> None:
        self._charges = charges
        self._turns = turns

    async def publish(self, messages: Sequence[OutboxMessage]) -> Sequence[Exception | None]:
        outcomes: dict[int, Exception | None] = {}
        for publisher, own in (
            (self._charges, [each for each in messages if each.event_type != TURN_COMPLETED]),
            (self._turns, [each for each in messages if each.event_type == TURN_COMPLETED]),
        ):
            if not own:
                continue
            try:
                results: Sequence[Exception | None] = await publisher.publish(own)
            except DependencyUnavailable as error:
                if publisher is self._charges and len(own) == len(messages):
                    raise
                results = [error] * len(own)
            outcomes.update(zip((each.message_id for each in own), results, strict=True))
        return [outcomes[each.message_id] for each in messages]
