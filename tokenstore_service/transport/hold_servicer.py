"""creditmesh.tokenstore.v1.HoldService."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from creditmesh.tokenstore.v1 import hold_service_pb2, hold_service_pb2_grpc

from servicekit.rpc.times import timestamp_from_proto
from tokenstore_service.domain.commands import ExtendHold, HoldChanged, HoldGranted, HoldRefused, ReleaseHold
from tokenstore_service.domain.hold import HoldState
from tokenstore_service.transport.books import Books, Context, raise_first, size_of
from tokenstore_service.usecases import read_books
from tokenstore_service.wire.holds import (
    hold_change_to_proto,
    hold_result_to_proto,
    hold_to_proto,
    open_hold_from_proto,
    ttl_from_proto,
)


class HoldServicer(hold_service_pb2_grpc.HoldServiceServicer):
    """Credit set aside for running calls."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def OpenHolds(
        self, request: hold_service_pb2.OpenHoldsRequest, context: Context
    ) -> hold_service_pb2.OpenHoldsResponse:
        commands = [open_hold_from_proto(each, index=index) for index, each in enumerate(request.requests)]
        answers = await self._books.writer.apply_all(commands)
        raise_first(answers)
        return hold_service_pb2.OpenHoldsResponse(results=[
            hold_result_to_proto(answer) for answer in answers if isinstance(answer, HoldGranted | HoldRefused)
        ])

    async def ExtendHolds(
        self, request: hold_service_pb2.ExtendHoldsRequest, context: Context
    ) -> hold_service_pb2.ExtendHoldsResponse:
        ttl = ttl_from_proto(request.ttl if request.HasField("ttl") else None)
        commands = [ExtendHold(each.user_id, UUID(each.hold_id), ttl) for each in request.holds]
        return hold_service_pb2.ExtendHoldsResponse(results=await self._change(commands))

    async def ReleaseHolds(
        self, request: hold_service_pb2.ReleaseHoldsRequest, context: Context
    ) -> hold_service_pb2.ReleaseHoldsResponse:
        commands = [ReleaseHold(each.user_id, UUID(each.hold_id)) for each in request.holds]
        return hold_service_pb2.ReleaseHoldsResponse(results=await self._change(commands))

    async def _change(self, commands: Sequence[ExtendHold | ReleaseHold]) -> list[hold_service_pb2.HoldChange]:
        answers = await self._books.writer.apply_all(commands)
        raise_first(answers)
        return [hold_change_to_proto(answer) for answer in answers if isinstance(answer, HoldChanged)]

    async def GetHold(
        self, request: hold_service_pb2.GetHoldRequest, context: Context
    ) -> hold_service_pb2.GetHoldResponse:
        hold = await read_books.get_hold(self._books.reader, request.user_id, UUID(request.hold_id))
        return hold_service_pb2.GetHoldResponse(hold=hold_to_proto(hold))

    async def ListHolds(
        self, request: hold_service_pb2.ListHoldsRequest, context: Context
    ) -> hold_service_pb2.ListHoldsResponse:
        if request.user_id:
            holds, token = await read_books.list_holds(
                self._books.reader, request.user_id, state=HoldState(request.state or HoldState.OPEN),
                page_size=size_of(request), page_token=request.page_token,
            )
        else:
            since = None
            if request.HasField("closed_since"):
                since = timestamp_from_proto(request.closed_since, field="closed_since")
            holds, token = await read_books.list_expired_holds(
                self._books.reader, origin=request.origin, since=since, page_size=size_of(request),
                page_token=request.page_token,
            )
        return hold_service_pb2.ListHoldsResponse(holds=[hold_to_proto(each) for each in holds], next_page_token=token)
