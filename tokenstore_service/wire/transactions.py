"""Ledger entries as they travel."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import ledger_service_pb2, transaction_pb2

from metering.charge import Quote
from metering.wire import quote_to_proto, usage_to_proto
from servicekit.rpc.times import timestamp_from_proto, timestamp_to_proto
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource
from tokenstore_service.domain.verification import Finding
from tokenstore_service.usecases.ports import EntryFilter
from tokenstore_service.usecases.read_books import Explanation
from tokenstore_service.usecases.verify_ledger import Summary

SOURCE_LABELS = {
    EntrySource.PURCHASE: "Purchase", EntrySource.CHARGE: "Model call", EntrySource.REWARD: "Reward",
    EntrySource.ADJUSTMENT: "Adjustment", EntrySource.REFUND: "Refund", EntrySource.EXPIRY: "Expiry",
    EntrySource.REVERSAL: "Reversal",
}
Direction = transaction_pb2.TransactionDirection


def flags_to_proto(flags: EntryFlag) -> list[transaction_pb2.TransactionFlag.ValueType]:
    numbers = [flag.value.bit_length() - 1 for flag in EntryFlag if flag in flags]
    return [transaction_pb2.TransactionFlag.ValueType(number) for number in numbers]


def transaction_to_proto(entry: Entry) -> transaction_pb2.Transaction:
    quote = None
    if entry.rates is not None:
        quote = Quote(entry.price_rule_id, entry.price_rule_version, entry.rates)
    return transaction_pb2.Transaction(
        user_id=entry.user_id, seq=entry.seq, event_id=entry.event_id,
        source=transaction_pb2.TransactionSource.ValueType(entry.source), source_label=SOURCE_LABELS[entry.source],
        direction=(
            Direction.TRANSACTION_DIRECTION_EXPENSE if entry.is_expense else Direction.TRANSACTION_DIRECTION_INCOME
        ),
        amount_micros=entry.amount_micros, balance_after_micros=entry.balance_after_micros,
        status=transaction_pb2.TransactionStatus.ValueType(entry.status), scene=entry.scene, model=entry.model,
        provider=entry.provider, usage=usage_to_proto(entry.usage) if entry.usage else None,
        quote=quote_to_proto(quote) if quote else None, call_id=entry.call_id, conversation_id=entry.conversation_id,
        reference=entry.reference, description=entry.description, occurred_at=timestamp_to_proto(entry.occurred_at),
        booked_at=timestamp_to_proto(entry.booked_at), entry_hash=entry.entry_hash, flags=flags_to_proto(entry.flags),
        request_id=entry.request_id,
    )


def entry_filter_from_proto(request: ledger_service_pb2.ListTransactionsRequest) -> EntryFilter:
    is_expense = None
    if request.direction:
        is_expense = request.direction == Direction.TRANSACTION_DIRECTION_EXPENSE
    since = getattr(request, "from")  # `from` is a keyword here
    return EntryFilter(
        user_id=request.user_id, source=int(request.source) or None, is_expense=is_expense,
        since=timestamp_from_proto(since, field="from") if request.HasField("from") else None,
        until=timestamp_from_proto(request.to, field="to") if request.HasField("to") else None,
    )


def explanation_to_proto(explanation: Explanation) -> ledger_service_pb2.ExplainChargeResponse:
    return ledger_service_pb2.ExplainChargeResponse(
        transaction=transaction_to_proto(explanation.entry),
        lines=[
            ledger_service_pb2.ChargeLine(
                component=line.component, tokens=line.tokens, rate_pico=line.rate_pico, amount_pico=line.amount_pico
            )
            for line in explanation.lines
        ],
        recomputed_micros=explanation.recomputed_micros, agrees=explanation.agrees,
    )


def verification_to_proto(piece: Finding | Summary) -> ledger_service_pb2.VerifyLedgerResponse:
    if isinstance(piece, Finding):
        return ledger_service_pb2.VerifyLedgerResponse(finding=ledger_service_pb2.LedgerFinding(
            user_id=piece.user_id, seq=piece.seq, kind=piece.kind, detail=piece.detail
        ))
    return ledger_service_pb2.VerifyLedgerResponse(summary=ledger_service_pb2.VerifySummary(
        accounts=piece.accounts, entries=piece.entries, findings=piece.findings
    ))
