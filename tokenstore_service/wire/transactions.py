"""Ledger entries as they travel."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import ledger_service_pb2, transaction_pb2

from metering.charge import Quote, Rates
from metering.wire import quote_to_proto, rates_from_proto, usage_from_proto, usage_to_proto
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_from_proto, timestamp_to_proto
from tokenstore_service.domain.consumption import Consumption
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource, EntryStatus
from tokenstore_service.domain.lot import Lot, uses_from_text, uses_to_text
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
    if not flags:
        return []
    numbers = [flag.value.bit_length() - 1 for flag in EntryFlag if flag in flags]
    return [transaction_pb2.TransactionFlag.ValueType(number) for number in numbers]


def transaction_to_proto(entry: Entry, *, reversed_by_seq: int = 0) -> transaction_pb2.Transaction:
    quote = None
    if entry.price_rule_id:
        quote = Quote(entry.price_rule_id, entry.price_rule_version, entry.rates or Rates())
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
        lots=[transaction_pb2.LotUse(lot_seq=seq, micros=micros) for seq, micros in uses_from_text(entry.lots)],
        granted_lot=granted_lot_to_proto(entry), order_id=entry.order_id, actor=entry.actor,
        reverses_seq=entry.reverses_seq or 0, reversed_by_seq=reversed_by_seq, unit_type=entry.unit_type,
        unit_amount=entry.unit_amount, unit_pico=entry.unit_pico or 0, details=entry.details, form=entry.form,
    )


def transaction_from_proto(message: transaction_pb2.Transaction) -> Entry:
    """An entry out of an export; with its hash as it is told. Raises InvalidField for times out of range."""
    lot = message.granted_lot if message.HasField("granted_lot") else None
    has_quote, has_units = message.HasField("quote"), bool(message.unit_type)
    expires_at = None
    if lot is not None and lot.HasField("expires_at"):
        expires_at = timestamp_from_proto(lot.expires_at, field="expires_at")
    return Entry(
        user_id=message.user_id, seq=message.seq, event_id=message.event_id, source=EntrySource(message.source),
        amount_micros=message.amount_micros, balance_after_micros=message.balance_after_micros,
        status=EntryStatus(message.status), occurred_at=timestamp_from_proto(message.occurred_at, field="occurred_at"),
        booked_at=timestamp_from_proto(message.booked_at, field="booked_at"), scene=message.scene,
        model=message.model, provider=message.provider,
        usage=usage_from_proto(message.usage) if message.HasField("usage") else None,
        price_rule_id=message.quote.price_rule_id, price_rule_version=message.quote.price_rule_version,
        rates=rates_from_proto(message.quote.rates) if has_quote and not has_units else None, call_id=message.call_id,
        request_id=message.request_id, conversation_id=message.conversation_id, reference=message.reference,
        description=message.description, flags=EntryFlag(sum(1 << flag for flag in message.flags)),
        entry_hash=message.entry_hash, form=message.form,
        lots=uses_to_text((use.lot_seq, use.micros) for use in message.lots),
        lot_source=EntrySource(lot.source) if lot is not None and lot.source else None,
        lot_priority=lot.priority if lot is not None and lot.source else None, lot_expires_at=expires_at,
        order_id=message.order_id, actor=message.actor, reverses_seq=message.reverses_seq or None,
        unit_type=message.unit_type, unit_amount=message.unit_amount,
        unit_pico=message.unit_pico if has_quote and has_units else None, details=message.details,
    )


def granted_lot_to_proto(entry: Entry) -> transaction_pb2.GrantedLot | None:
    if entry.lot_source is None and entry.lot_expires_at is None:
        return None
    return transaction_pb2.GrantedLot(
        source=transaction_pb2.TransactionSource.ValueType(entry.lot_source or 0), priority=entry.lot_priority or 0,
        expires_at=optional_timestamp_to_proto(entry.lot_expires_at),
    )


def lot_to_proto(lot: Lot) -> ledger_service_pb2.Lot:
    return ledger_service_pb2.Lot(
        lot_seq=lot.seq, source=transaction_pb2.TransactionSource.ValueType(lot.source), priority=lot.priority,
        granted_micros=lot.granted_micros, remaining_micros=lot.remaining_micros,
        expires_at=optional_timestamp_to_proto(lot.expires_at), order_id=lot.order_id,
        granted_at=timestamp_to_proto(lot.granted_at),
    )


def consumption_to_proto(key: str, sums: Consumption) -> ledger_service_pb2.Consumption:
    return ledger_service_pb2.Consumption(
        key=key, calls=sums.calls, input_tokens=sums.input_tokens, cached_input_tokens=sums.cached_input_tokens,
        output_tokens=sums.output_tokens, reasoning_tokens=sums.reasoning_tokens,
        total_tokens=sums.input_tokens + sums.output_tokens, credit_micros=sums.micros,
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
        scene=request.scene, model=request.model, conversation_id=request.conversation_id, order_id=request.order_id,
    )


def explanation_to_proto(explanation: Explanation) -> ledger_service_pb2.ExplainChargeResponse:
    return ledger_service_pb2.ExplainChargeResponse(
        transaction=transaction_to_proto(explanation.entry),
        lines=[
            ledger_service_pb2.ChargeLine(
                component=line.component, tokens=line.tokens, rate_pico=line.rate_pico, amount_pico=line.amount_pico,
                unit_amount=explanation.entry.unit_amount,
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
    summary = ledger_service_pb2.VerifySummary(
        accounts=piece.accounts, entries=piece.entries, findings=piece.findings, last_user_id=piece.last_user_id
    )
    if piece.is_last:
        return ledger_service_pb2.VerifyLedgerResponse(summary=summary)
    return ledger_service_pb2.VerifyLedgerResponse(progress=summary)
