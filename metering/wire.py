"""Usage, rates and quotes as they travel."""

from __future__ import annotations

from creditmesh.common.v1 import billing_pb2

from metering.charge import Quote, Rates
from metering.usage import Usage, UsageSource


def usage_from_proto(message: billing_pb2.Usage) -> Usage:
    return Usage(
        input_tokens=message.input_tokens,
        cached_input_tokens=message.cached_input_tokens,
        cache_write_tokens=message.cache_write_tokens,
        output_tokens=message.output_tokens,
        reasoning_tokens=message.reasoning_tokens,
        input_audio_tokens=message.input_audio_tokens,
        output_audio_tokens=message.output_audio_tokens,
        source=UsageSource(message.source or UsageSource.PROVIDER_REPORTED),
    )


def usage_to_proto(usage: Usage) -> billing_pb2.Usage:
    return billing_pb2.Usage(
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        input_audio_tokens=usage.input_audio_tokens,
        output_audio_tokens=usage.output_audio_tokens,
        source=billing_pb2.UsageSource.ValueType(usage.source),
    )


def rates_from_proto(message: billing_pb2.Rates) -> Rates:
    return Rates(
        input_pico=message.input_pico,
        cached_input_pico=message.cached_input_pico,
        cache_write_pico=message.cache_write_pico,
        output_pico=message.output_pico,
        reasoning_pico=message.reasoning_pico,
        input_audio_pico=message.input_audio_pico,
        output_audio_pico=message.output_audio_pico,
        per_call_pico=message.per_call_pico,
    )


def rates_to_proto(rates: Rates) -> billing_pb2.Rates:
    return billing_pb2.Rates(
        input_pico=rates.input_pico,
        cached_input_pico=rates.cached_input_pico,
        cache_write_pico=rates.cache_write_pico,
        output_pico=rates.output_pico,
        reasoning_pico=rates.reasoning_pico,
        input_audio_pico=rates.input_audio_pico,
        output_audio_pico=rates.output_audio_pico,
        per_call_pico=rates.per_call_pico,
    )


def quote_from_proto(message: billing_pb2.Quote) -> Quote:
    return Quote(
        rule_id=message.price_rule_id, version=message.price_rule_version, rates=rates_from_proto(message.rates)
    )


def quote_to_proto(quote: Quote) -> billing_pb2.Quote:
    return billing_pb2.Quote(
        price_rule_id=quote.rule_id, price_rule_version=quote.version, rates=rates_to_proto(quote.rates)
    )
