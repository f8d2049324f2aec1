"""The RPCs: convert in, call the use case, convert out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import grpc.aio
from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    balance_service_pb2_grpc,
    charge_service_pb2,
    charge_service_pb2_grpc,
    hold_service_pb2,
    hold_service_pb2_grpc,
    ledger_service_pb2,
    ledger_service_pb2_grpc,
    pricing_service_pb2,
    pricing_service_pb2_grpc,
)

from metering.wire import quote_to_proto, usage_from_proto
from servicekit.core.clock import Clock
from servicekit.core.ids import IdSource
from servicekit.rpc.server import Service
from servicekit.rpc.times import timestamp_from_proto
from tokenstore_service.domain.commands import (
    AdjustBalance,
    Answer,
    BalanceAdjusted,
    ChargeRecorded,
    ExtendHold,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    ReleaseHold,
)
from tokenstore_service.domain.hold import HoldState
from tokenstore_service.domain.price_rule import PriceRuleStatus
from tokenstore_service.usecases import manage_prices, read_books
from tokenstore_service.usecases.ports import LedgerReader, PriceRules, Prices
from tokenstore_service.usecases.verify_ledger import verify_ledger
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.balances import balance_to_proto
from tokenstore_service.wire.charges import DEFAULT_SCENE, charge_from_proto, record_result_to_proto
from tokenstore_service.wire.holds import (
    hold_change_to_proto,
    hold_result_to_proto,
    hold_to_proto,
    open_hold_from_proto,
    ttl_from_proto,
)
from tokenstore_service.wire.price_rules import price_rule_from_proto, price_rule_to_proto
from tokenstore_service.wire.transactions import (
    entry_filter_from_proto,
    explanation_to_proto,
    transaction_to_proto,
    verification_to_proto,
)

Context = grpc.aio.ServicerContext[Any, Any]
PACKAGE = "creditmesh.tokenstore.v1"
DEFAULT_PAGE_SIZE = 50


@dataclass(frozen=True, slots=True)
class Books:
    """What the servicers work with."""

    writer: BookWriter
    reader: LedgerReader
    rules: PriceRules
    prices: Prices
    clock: Clock
    ids: IdSource


def _raise_first(answers: Sequence[Answer | Exception]) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


class BalanceServicer(balance_service_pb2_grpc.BalanceServiceServicer):
    """creditmesh.tokenstore.v1.BalanceService."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def GetBalance(
        self, request: balance_service_pb2.GetBalanceRequest, context: Context
    ) -> balance_service_pb2.GetBalanceResponse:
        books = self._books
        account = await read_books.get_balance(
            books.reader, request.user_id, min_seq=request.min_seq, clock=books.clock
        )
        return balance_service_pb2.GetBalanceResponse(balance=balance_to_proto(account))

    async def BatchGetBalances(
        self, request: balance_service_pb2.BatchGetBalancesRequest, context: Context
    ) -> balance_service_pb2.BatchGetBalancesResponse:
        accounts = await read_books.get_balances(self._books.reader, request.user_ids)
        return balance_service_pb2.BatchGetBalancesResponse(balances=[balance_to_proto(each) for each in accounts])


class HoldServicer(hold_service_pb2_grpc.HoldServiceServicer):
    """creditmesh.tokenstore.v1.HoldService."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def OpenHolds(
        self, request: hold_service_pb2.OpenHoldsRequest, context: Context
    ) -> hold_service_pb2.OpenHoldsResponse:
        commands = [open_hold_from_proto(each, index=index) for index, each in enumerate(request.requests)]
        answers = await self._books.writer.apply_all(commands)
        _raise_first(answers)
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
        _raise_first(answers)
        return [hold_change_to_proto(answer) for answer in answers if isinstance(answer, HoldChanged)]

    async def GetHold(
        self, request: hold_service_pb2.GetHoldRequest, context: Context
    ) -> hold_service_pb2.GetHoldResponse:
        hold = await read_books.get_hold(self._books.reader, request.user_id, UUID(request.hold_id))
        return hold_service_pb2.GetHoldResponse(hold=hold_to_proto(hold))

    async def ListHolds(
        self, request: hold_service_pb2.ListHoldsRequest, context: Context
    ) -> hold_service_pb2.ListHoldsResponse:
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        if request.user_id:
            holds, token = await read_books.list_holds(
                self._books.reader, request.user_id, state=HoldState(request.state or HoldState.OPEN),
                page_size=page_size, page_token=request.page_token,
            )
        else:
            since = None
            if request.HasField("closed_since"):
                since = timestamp_from_proto(request.closed_since, field="closed_since")
            holds, token = await read_books.list_expired_holds(
                self._books.reader, origin=request.origin, since=since, page_size=page_size,
                page_token=request.page_token,
            )
        return hold_service_pb2.ListHoldsResponse(holds=[hold_to_proto(each) for each in holds], next_page_token=token)


class ChargeServicer(charge_service_pb2_grpc.ChargeServiceServicer):
    """creditmesh.tokenstore.v1.ChargeService."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def RecordCharges(
        self, request: charge_service_pb2.RecordChargesRequest, context: Context
    ) -> charge_service_pb2.RecordChargesResponse:
        now = self._books.clock.now()
        commands = [
            charge_from_proto(each, now=now, field=f"charges[{index}].") for index, each in enumerate(request.charges)
        ]
        answers = await self._books.writer.apply_all(commands)
        _raise_first(answers)
        return charge_service_pb2.RecordChargesResponse(results=[
            record_result_to_proto(answer) for answer in answers if isinstance(answer, ChargeRecorded)
        ])


class LedgerServicer(ledger_service_pb2_grpc.LedgerServiceServicer):
    """creditmesh.tokenstore.v1.LedgerService."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def ListTransactions(
        self, request: ledger_service_pb2.ListTransactionsRequest, context: Context
    ) -> ledger_service_pb2.ListTransactionsResponse:
        entries, token = await read_books.list_entries(
            self._books.reader, entry_filter_from_proto(request), page_size=request.page_size or DEFAULT_PAGE_SIZE,
            page_token=request.page_token,
        )
        return ledger_service_pb2.ListTransactionsResponse(
            transactions=[transaction_to_proto(entry) for entry in entries], next_page_token=token
        )

    async def GetTransaction(
        self, request: ledger_service_pb2.GetTransactionRequest, context: Context
    ) -> ledger_service_pb2.GetTransactionResponse:
        entry = await read_books.get_entry(
            self._books.reader, request.user_id, seq=request.seq, event_id=request.event_id
        )
        return ledger_service_pb2.GetTransactionResponse(transaction=transaction_to_proto(entry))

    async def AdjustBalance(
        self, request: ledger_service_pb2.AdjustBalanceRequest, context: Context
    ) -> ledger_service_pb2.AdjustBalanceResponse:
        command = AdjustBalance(
            user_id=request.user_id, amount_micros=request.amount_micros, reason=request.reason,
            reference=request.reference, idempotency_key=request.idempotency_key,
        )
        adjusted = await self._books.writer.apply(command, BalanceAdjusted)
        return ledger_service_pb2.AdjustBalanceResponse(
            transaction=transaction_to_proto(adjusted.entry), balance=balance_to_proto(adjusted.account)
        )

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
        async for piece in verify_ledger(self._books.reader, None if request.all else request.user_id):
            yield verification_to_proto(piece)


class PricingServicer(pricing_service_pb2_grpc.PricingServiceServicer):
    """creditmesh.tokenstore.v1.PricingService."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def CreatePriceRule(
        self, request: pricing_service_pb2.CreatePriceRuleRequest, context: Context
    ) -> pricing_service_pb2.CreatePriceRuleResponse:
        books = self._books
        draft = price_rule_from_proto(request.price_rule, now=books.clock.now())
        rule = await manage_prices.create_price_rule(
            books.rules, books.prices, draft, idempotency_key=request.idempotency_key, clock=books.clock, ids=books.ids
        )
        return pricing_service_pb2.CreatePriceRuleResponse(price_rule=price_rule_to_proto(rule))

    async def UpdatePriceRule(
        self, request: pricing_service_pb2.UpdatePriceRuleRequest, context: Context
    ) -> pricing_service_pb2.UpdatePriceRuleResponse:
        books = self._books
        draft = price_rule_from_proto(request.price_rule, now=books.clock.now())
        rule = await manage_prices.update_price_rule(
            books.rules, books.prices, draft, idempotency_key=request.idempotency_key, clock=books.clock
        )
        return pricing_service_pb2.UpdatePriceRuleResponse(price_rule=price_rule_to_proto(rule))

    async def ListPriceRules(
        self, request: pricing_service_pb2.ListPriceRulesRequest, context: Context
    ) -> pricing_service_pb2.ListPriceRulesResponse:
        rules, token = await manage_prices.list_price_rules(
            self._books.rules, scene=request.scene, provider=request.provider, model=request.model,
            status=PriceRuleStatus(request.status) if request.status else None,
            page_size=request.page_size or DEFAULT_PAGE_SIZE, page_token=request.page_token,
        )
        return pricing_service_pb2.ListPriceRulesResponse(
            price_rules=[price_rule_to_proto(rule) for rule in rules], next_page_token=token
        )

    async def GetPriceRule(
        self, request: pricing_service_pb2.GetPriceRuleRequest, context: Context
    ) -> pricing_service_pb2.GetPriceRuleResponse:
        rule = await manage_prices.get_price_rule(self._books.rules, request.rule_id, request.version)
        return pricing_service_pb2.GetPriceRuleResponse(price_rule=price_rule_to_proto(rule))

    async def Quote(
        self, request: pricing_service_pb2.QuoteRequest, context: Context
    ) -> pricing_service_pb2.QuoteResponse:
        at = timestamp_from_proto(request.at, field="at") if request.HasField("at") else self._books.clock.now()
        quote, micros = manage_prices.quote_usage(
            self._books.prices, scene=request.scene or DEFAULT_SCENE, provider=request.provider, model=request.model,
            usage=usage_from_proto(request.usage) if request.HasField("usage") else None, at=at,
        )
        return pricing_service_pb2.QuoteResponse(quote=quote_to_proto(quote), credit_micros=micros)


def services(books: Books) -> list[Service]:
    """What this server serves, with the scope of each RPC."""
    return [
        Service(
            f"{PACKAGE}.BalanceService",
            {"GetBalance": "balance.read", "BatchGetBalances": "balance.read"},
            lambda server: balance_service_pb2_grpc.add_BalanceServiceServicer_to_server(
                BalanceServicer(books), server
            ),
        ),
        Service(
            f"{PACKAGE}.HoldService",
            {
                "OpenHolds": "holds.write", "ExtendHolds": "holds.write", "ReleaseHolds": "holds.write",
                "GetHold": "balance.read", "ListHolds": "balance.read",
            },
            lambda server: hold_service_pb2_grpc.add_HoldServiceServicer_to_server(HoldServicer(books), server),
        ),
        Service(
            f"{PACKAGE}.ChargeService",
            {"RecordCharges": "charges.write"},
            lambda server: charge_service_pb2_grpc.add_ChargeServiceServicer_to_server(ChargeServicer(books), server),
        ),
        Service(
            f"{PACKAGE}.LedgerService",
            {
                "ListTransactions": "ledger.read", "GetTransaction": "ledger.read", "AdjustBalance": "ledger.adjust",
                "ExplainCharge": "ledger.read", "VerifyLedger": "ledger.read",
            },
            lambda server: ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(LedgerServicer(books), server),
        ),
        Service(
            f"{PACKAGE}.PricingService",
            {
                "CreatePriceRule": "prices.admin", "UpdatePriceRule": "prices.admin", "ListPriceRules": "ledger.read",
                "GetPriceRule": "ledger.read", "Quote": "ledger.read",
            },
            lambda server: pricing_service_pb2_grpc.add_PricingServiceServicer_to_server(
                PricingServicer(books), server
            ),
        ),
    ]
