"""Price rules as they travel."""

from __future__ import annotations

from datetime import datetime

from creditmesh.tokenstore.v1 import pricing_service_pb2

from metering.wire import rates_to_proto
from servicekit.core.errors import InvalidField
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_from_proto
from tokenstore_service.domain.price_rule import ANY, PriceRule, PriceRuleStatus, UnitPrice


def _optional(message: pricing_service_pb2.PriceRule, field: str) -> int | None:
    return int(getattr(message, field)) if message.HasField(field) else None  # type: ignore[arg-type]  # by name


def _time(message: pricing_service_pb2.PriceRule, field: str) -> datetime | None:
    if not message.HasField(field):  # type: ignore[arg-type]  # by name
        return None
    return timestamp_from_proto(getattr(message, field), field=f"price_rule.{field}")


def _unit_prices(message: pricing_service_pb2.PriceRule) -> tuple[UnitPrice, ...]:
    prices = [UnitPrice(each.unit_type.casefold(), each.price_micros) for each in message.unit_prices]
    if len({price.unit_type for price in prices}) < len(prices):
        raise InvalidField.of("price_rule.unit_prices", "must price each unit once")
    return tuple(sorted(prices, key=lambda price: price.unit_type))


def price_rule_from_proto(message: pricing_service_pb2.PriceRule, *, now: datetime) -> PriceRule:
    """A draft: version and rates are made by the use case. Raises InvalidField."""
    if not message.currency:
        raise InvalidField.of("price_rule.currency", "must be three capital letters")
    return PriceRule(
        rule_id=message.rule_id, version=0, scene=message.scene or ANY, provider=message.provider or ANY,
        model=message.model or ANY, currency=message.currency, input_price=message.input_price_micros_per_mtok,
        output_price=message.output_price_micros_per_mtok,
        cached_input_price=_optional(message, "cached_input_price_micros_per_mtok"),
        cache_write_price=_optional(message, "cache_write_price_micros_per_mtok"),
        reasoning_price=_optional(message, "reasoning_price_micros_per_mtok"),
        input_audio_price=_optional(message, "input_audio_price_micros_per_mtok"),
        output_audio_price=_optional(message, "output_audio_price_micros_per_mtok"),
        per_call_price=message.per_call_price_micros, credits_per_currency_unit=message.credits_per_currency_unit,
        markup_bps=message.markup_bps, priority=message.priority,
        status=PriceRuleStatus(message.status or PriceRuleStatus.ACTIVE), valid_from=_time(message, "valid_from"),
        valid_to=_time(message, "valid_to"), description=message.description, created_at=now,
        unit_prices=_unit_prices(message),
    )


def price_rule_to_proto(rule: PriceRule) -> pricing_service_pb2.PriceRule:
    return pricing_service_pb2.PriceRule(
        rule_id=rule.rule_id, version=rule.version, scene=rule.scene, provider=rule.provider, model=rule.model,
        currency=rule.currency, input_price_micros_per_mtok=rule.input_price,
        output_price_micros_per_mtok=rule.output_price, cached_input_price_micros_per_mtok=rule.cached_input_price,
        cache_write_price_micros_per_mtok=rule.cache_write_price,
        reasoning_price_micros_per_mtok=rule.reasoning_price,
        input_audio_price_micros_per_mtok=rule.input_audio_price,
        output_audio_price_micros_per_mtok=rule.output_audio_price, per_call_price_micros=rule.per_call_price,
        credits_per_currency_unit=rule.credits_per_currency_unit, markup_bps=rule.markup_bps, priority=rule.priority,
        status=pricing_service_pb2.PriceRuleStatus.ValueType(rule.status),
        valid_from=optional_timestamp_to_proto(rule.valid_from), valid_to=optional_timestamp_to_proto(rule.valid_to),
        description=rule.description, rates=rates_to_proto(rule.rates),
        created_at=optional_timestamp_to_proto(rule.created_at),
        unit_prices=[
            pricing_service_pb2.UnitPrice(unit_type=price.unit_type, price_micros=price.price_micros)
            for price in rule.unit_prices
        ],
    )
