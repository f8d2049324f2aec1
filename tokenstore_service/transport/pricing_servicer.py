"""creditmesh.tokenstore.v1.PricingService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from creditmesh.tokenstore.v1 import pricing_service_pb2, pricing_service_pb2_grpc

from metering.wire import quote_to_proto, usage_from_proto
from servicekit.rpc.times import timestamp_from_proto
from tokenstore_service.domain.price_rule import PriceRuleStatus
from tokenstore_service.domain.units import amount_from_text
from tokenstore_service.transport.books import Books, Context, size_of
from tokenstore_service.usecases import manage_prices
from tokenstore_service.wire.charges import DEFAULT_SCENE
from tokenstore_service.wire.price_rules import price_rule_from_proto, price_rule_to_proto
from tokenstore_service.wire.usage_events import DEFAULT_SCENE as UNIT_SCENE


class PricingServicer(pricing_service_pb2_grpc.PricingServiceServicer):
    """What usage costs."""

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
            page_size=size_of(request), page_token=request.page_token,
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
        if request.unit_type:
            amount = amount_from_text(request.unit_amount or "0", field="unit_amount")
            quote, unit_pico, micros = manage_prices.quote_units(
                self._books.prices, scene=request.scene or UNIT_SCENE, provider=request.provider, model=request.model,
                unit_type=request.unit_type.casefold(), amount=amount, at=at,
            )
            return pricing_service_pb2.QuoteResponse(
                quote=quote_to_proto(quote), credit_micros=micros, unit_pico=unit_pico
            )
        quote, micros = manage_prices.quote_usage(
            self._books.prices, scene=request.scene or DEFAULT_SCENE, provider=request.provider, model=request.model,
            usage=usage_from_proto(request.usage) if request.HasField("usage") else None, at=at,
        )
        return pricing_service_pb2.QuoteResponse(quote=quote_to_proto(quote), credit_micros=micros)

    async def SimulatePricing(
        self, request: pricing_service_pb2.SimulatePricingRequest, context: Context
    ) -> AsyncIterator[pricing_service_pb2.SimulatePricingResponse]:
        since = getattr(request, "from")  # `from` is a keyword here
        async for sums in manage_prices.simulate_pricing(
            self._books.reader, self._books.prices,
            price_rule_from_proto(request.price_rule, now=self._books.clock.now()), user_id=request.user_id,
            since=timestamp_from_proto(since, field="from") if request.HasField("from") else None,
            until=timestamp_from_proto(request.to, field="to") if request.HasField("to") else None,
        ):
            yield pricing_service_pb2.SimulatePricingResponse(
                charges=sums.charges, matched=sums.matched, charged_micros=sums.charged_micros,
                simulated_micros=sums.simulated_micros, unpriced=sums.unpriced, done=sums.done,
            )
