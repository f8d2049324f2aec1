"""creditmesh.tokenstore.v1.LedgerService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from creditmesh.tokenstore.v1 import ledger_service_pb2, ledger_service_pb2_grpc

from servicekit.core.errors import InvalidField
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_from_proto
from tokenstore_service.domain.commands import AccountChanged, AdjustBalance, Booked, ReverseEntry, SetOverdraftLimit
from tokenstore_service.transport.books import Books, Context, actor, size_of
from tokenstore_service.usecases import read_books
from tokenstore_service.usecases.verify_ledger import verify_ledger
from tokenstore_service.wire.balances import balance_to_proto
from tokenstore_service.wire.transactions import (
    consumption_to_proto,
    entry_filter_from_proto,
    explanation_to_proto,
    lot_to_proto,
    transaction_to_proto,
    verification_to_proto,
)

GROUPS = {
    ledger_service_pb2.CONSUMPTION_GROUP_UNSPECIFIED: "none",
    ledger_service_pb2.CONSUMPTION_GROUP_NONE: "none",
    ledger_service_pb2.CONSUMPTION_GROUP_MODEL: "model",
    ledger_service_pb2.CONSUMPTION_GROUP_SCENE: "scene",
    ledger_service_pb2.CONSUMPTION_GROUP_HOUR: "hour",
    ledger_service_pb2.CONSUMPTION_GROUP_DAY: "day",
}


class LedgerServicer(ledger_service_pb2_grpc.LedgerServiceServicer):
    """The books."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def ListTransactions(
        self, request: ledger_service_pb2.ListTransactionsRequest, context: Context
    ) -> ledger_service_pb2.ListTransactionsResponse:
        reader = self._books.reader
        entries, token = await read_books.list_entries(
            reader, entry_filter_from_proto(request), page_size=size_of(request), page_token=request.page_token
        )
        reversals = await reader.reversals(request.user_id, [entry.seq for entry in entries])
        return ledger_service_pb2.ListTransactionsResponse(
            transactions=[
                transaction_to_proto(entry, reversed_by_seq=reversals.get(entry.seq, 0)) for entry in entries
            ],
            next_page_token=token,
        )

    async def GetTransaction(
        self, request: ledger_service_pb2.GetTransactionRequest, context: Context
    ) -> ledger_service_pb2.GetTransactionResponse:
        reader = self._books.reader
        entry = await read_books.get_entry(reader, request.user_id, seq=request.seq, event_id=request.event_id)
        reversals = await reader.reversals(request.user_id, [entry.seq])
        return ledger_service_pb2.GetTransactionResponse(
            transaction=transaction_to_proto(entry, reversed_by_seq=reversals.get(entry.seq, 0))
        )

    async def AdjustBalance(
        self, request: ledger_service_pb2.AdjustBalanceRequest, context: Context
    ) -> ledger_service_pb2.AdjustBalanceResponse:
        expires_at = None
        if request.HasField("expires_at"):
            expires_at = timestamp_from_proto(request.expires_at, field="expires_at")
            if request.amount_micros < 0 or expires_at <= self._books.clock.now():
                raise InvalidField.of("expires_at", "must be in the future, and goes with a positive amount")
        adjusted = await self._books.writer.apply(AdjustBalance(
            user_id=request.user_id, amount_micros=request.amount_micros, reason=request.reason,
            reference=request.reference, idempotency_key=request.idempotency_key, actor=actor(), expires_at=expires_at,
        ), Booked)
        return ledger_service_pb2.AdjustBalanceResponse(
            transaction=transaction_to_proto(adjusted.entry), balance=balance_to_proto(adjusted.account)
        )

    async def ReverseTransaction(
        self, request: ledger_service_pb2.ReverseTransactionRequest, context: Context
    ) -> ledger_service_pb2.ReverseTransactionResponse:
        booked = await self._books.writer.apply(ReverseEntry(
            user_id=request.user_id, seq=request.seq, reason=request.reason, idempotency_key=request.idempotency_key,
            actor=actor(), allow_negative=request.allow_negative,
        ), Booked)
        return ledger_service_pb2.ReverseTransactionResponse(
            transaction=transaction_to_proto(booked.entry), balance=balance_to_proto(booked.account)
        )

    async def SetOverdraftLimit(
        self, request: ledger_service_pb2.SetOverdraftLimitRequest, context: Context
    ) -> ledger_service_pb2.SetOverdraftLimitResponse:
        command = SetOverdraftLimit(request.user_id, request.overdraft_limit_micros)
        changed = await self._books.writer.apply(command, AccountChanged)
        return ledger_service_pb2.SetOverdraftLimitResponse(balance=balance_to_proto(changed.account))

    async def ExplainCharge(
        self, request: ledger_service_pb2.ExplainChargeRequest, context: Context
    ) -> ledger_service_pb2.ExplainChargeResponse:
        explanation = await read_books.explain_charge(
            self._books.reader, self._books.rules, request.user_id, request.event_id
        )
        return explanation_to_proto(explanation)

    async def VerifyLedger(
        self, request: ledger_service_pb2.VerifyLedgerRequest, context: Context
    ) -> AsyncIterator[ledger_service_pb2.VerifyLedgerResponse]:
        user_id = None if request.all else request.user_id
        async for piece in verify_ledger(self._books.reader, user_id, after_user_id=request.after_user_id):
            yield verification_to_proto(piece)

    async def ExportTransactions(
        self, request: ledger_service_pb2.ExportTransactionsRequest, context: Context
    ) -> AsyncIterator[ledger_service_pb2.ExportTransactionsResponse]:
        async for exported in read_books.export_entries(
            self._books.reader, request.user_id, after_seq=request.after_seq, after_user_id=request.after_user_id
        ):
            yield ledger_service_pb2.ExportTransactionsResponse(
                transaction=transaction_to_proto(exported.entry), previous_hash=exported.previous_hash
            )

    async def GetBalanceAt(
        self, request: ledger_service_pb2.GetBalanceAtRequest, context: Context
    ) -> ledger_service_pb2.GetBalanceAtResponse:
        at = timestamp_from_proto(request.time, field="time")
        entry = await read_books.balance_at(self._books.reader, request.user_id, at)
        if entry is None:
            return ledger_service_pb2.GetBalanceAtResponse()
        return ledger_service_pb2.GetBalanceAtResponse(
            balance_micros=entry.balance_after_micros, seq=entry.seq,
            booked_at=optional_timestamp_to_proto(entry.booked_at),
        )

    async def GetConsumption(
        self, request: ledger_service_pb2.GetConsumptionRequest, context: Context
    ) -> ledger_service_pb2.GetConsumptionResponse:
        read = await read_books.read_consumption(
            self._books.reader, request.user_id, period=request.period, group=GROUPS[request.group_by],
            now=self._books.clock.now(),
        )
        answer = ledger_service_pb2.GetConsumptionResponse(
            total=consumption_to_proto("", read.total),
            groups=[consumption_to_proto(key, sums) for key, sums in read.groups],
        )
        if read.since is not None:
            since = getattr(answer, "from")  # `from` is a keyword here
            since.FromDatetime(read.since)
        return answer

    async def ListLots(
        self, request: ledger_service_pb2.ListLotsRequest, context: Context
    ) -> ledger_service_pb2.ListLotsResponse:
        lots, token = await read_books.list_lots(
            self._books.reader, request.user_id, with_closed=request.with_closed, page_size=size_of(request),
            page_token=request.page_token,
        )
        return ledger_service_pb2.ListLotsResponse(lots=[lot_to_proto(lot) for lot in lots], next_page_token=token)
