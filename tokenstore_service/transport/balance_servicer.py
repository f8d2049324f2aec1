"""creditmesh.tokenstore.v1.BalanceService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from creditmesh.tokenstore.v1 import balance_service_pb2, balance_service_pb2_grpc

from tokenstore_service.transport.books import Books, Context
from tokenstore_service.wire.balances import balance_to_proto


class BalanceServicer(balance_service_pb2_grpc.BalanceServiceServicer):
    """What accounts have."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def GetBalance(
        self, request: balance_service_pb2.GetBalanceRequest, context: Context
    ) -> balance_service_pb2.GetBalanceResponse:
        account, source = await self._books.balances.get(request.user_id, min_seq=request.min_seq)
        return balance_service_pb2.GetBalanceResponse(balance=balance_to_proto(account, source=source))

    async def BatchGetBalances(
        self, request: balance_service_pb2.BatchGetBalancesRequest, context: Context
    ) -> balance_service_pb2.BatchGetBalancesResponse:
        accounts = await self._books.balances.get_many(request.user_ids)
        return balance_service_pb2.BatchGetBalancesResponse(
            balances=[balance_to_proto(account, source=source) for account, source in accounts]
        )

    async def WatchBalance(
        self, request: balance_service_pb2.WatchBalanceRequest, context: Context
    ) -> AsyncIterator[balance_service_pb2.WatchBalanceResponse]:
        async for account in self._books.feed.watch(request.user_id, from_seq=request.from_seq):
            yield balance_service_pb2.WatchBalanceResponse(balance=balance_to_proto(account))
