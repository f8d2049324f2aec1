"""A price table from a file: what would change, and changing it."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from creditmesh.tokenstore.v1 import pricing_service_pb2, pricing_service_pb2_grpc

from servicekit.cli import Client, fail

PRICES = {
    "input": "input_price_micros_per_mtok", "output": "output_price_micros_per_mtok",
    "cached_input": "cached_input_price_micros_per_mtok", "cache_write": "cache_write_price_micros_per_mtok",
    "reasoning": "reasoning_price_micros_per_mtok", "input_audio": "input_audio_price_micros_per_mtok",
    "output_audio": "output_audio_price_micros_per_mtok", "per_call": "per_call_price_micros",
}
"""Columns in units of the currency for a million tokens (per_call: for a call), and the fields that they fill."""
NUMBERS = ("credits_per_currency_unit", "markup_bps", "priority")
WORDS = ("scene", "provider", "model", "currency", "description")

PriceRule = pricing_service_pb2.PriceRule


def rules_from_file(path: Path, *, currency: str, credits_per_unit: int) -> list[PriceRule]:
    """CSV with a header, or a JSON list of objects. Exits with a line for the first thing that is wrong."""
    text = path.read_text()
    rows: list[dict[str, Any]] = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    return [_rule(row, number, currency, credits_per_unit) for number, row in enumerate(rows, 1)]


def _rule(row: dict[str, Any], number: int, currency: str, credits_per_unit: int) -> PriceRule:
    unknown = set(row) - {*PRICES, *NUMBERS, *WORDS}
    if unknown or not row.get("model"):
        fail(f"row {number}: needs model; unknown columns: {', '.join(sorted(map(str, unknown))) or 'none'}")
    rule = PriceRule(
        scene="*", provider="*", currency=currency, credits_per_currency_unit=credits_per_unit,
        status=pricing_service_pb2.PRICE_RULE_STATUS_ACTIVE,
    )
    try:
        for name in WORDS:
            if row.get(name):
                setattr(rule, name, str(row[name]))
        for name in NUMBERS:
            if row.get(name) not in (None, ""):
                setattr(rule, name, int(row[name]))
        for name, field in PRICES.items():
            if row.get(name) not in (None, ""):
                setattr(rule, field, int(Decimal(str(row[name])) * 1_000_000))
    except (ValueError, InvalidOperation):
        fail(f"row {number}: {name} is no number")
    return rule


def _key(rule: PriceRule) -> tuple[str, str, str, int]:
    return rule.scene.casefold(), rule.provider.casefold(), rule.model.casefold(), rule.priority


def _content(rule: PriceRule) -> PriceRule:
    """What a file says of a rule."""
    plain = PriceRule()
    plain.CopyFrom(rule)
    for name in ("rule_id", "version", "rates", "created_at", "valid_from", "valid_to"):
        plain.ClearField(name)
    return plain


def differences(old: PriceRule, new: PriceRule) -> list[str]:
    """`field: old -> new` for each field that differs."""
    lines = []
    for field in PriceRule.DESCRIPTOR.fields:
        before, after = getattr(_content(old), field.name), getattr(_content(new), field.name)
        if before != after:
            lines.append(f"{field.name}: {before} -> {after}")
    return lines


async def import_prices(client: Client, arguments: argparse.Namespace) -> None:
    stub = pricing_service_pb2_grpc.PricingServiceStub(client.channel)
    wanted = rules_from_file(
        Path(arguments.file), currency=arguments.currency, credits_per_unit=arguments.credits_per_unit
    )
    known: dict[tuple[str, str, str, int], PriceRule] = {}
    request = pricing_service_pb2.ListPriceRulesRequest(
        page_size=500, status=pricing_service_pb2.PRICE_RULE_STATUS_ACTIVE
    )
    while True:
        page = await stub.ListPriceRules(request, metadata=client.metadata, timeout=client.timeout)
        known.update({_key(rule): rule for rule in page.price_rules})
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    counts = {"new": 0, "changed": 0, "the same": 0}
    for rule in wanted:
        old = known.get(_key(rule))
        changes = differences(old, rule) if old else []
        what = "new" if old is None else "changed" if changes else "the same"
        counts[what] += 1
        if what == "the same":
            continue
        print(f"{what}: {rule.scene} {rule.provider} {rule.model}", *changes, sep="\n    ")
        if not arguments.dry_run:
            await _store(stub, client, rule, old)
    suffix = " (dry run, nothing was stored)" if arguments.dry_run else ""
    print(", ".join(f"{count} {what}" for what, count in counts.items()) + suffix)


async def _store(stub: Any, client: Client, rule: PriceRule, old: PriceRule | None) -> None:
    """The key is the content, so that a second run of an interrupted import makes nothing twice."""
    if old is not None:
        rule.rule_id = old.rule_id
    digest = hashlib.sha256(rule.SerializeToString(deterministic=True)).hexdigest()
    key = f"import:{old.version if old else 0}:{digest}"[:128]
    if old is None:
        create = pricing_service_pb2.CreatePriceRuleRequest(price_rule=rule, idempotency_key=key)
        await stub.CreatePriceRule(create, metadata=client.metadata, timeout=client.timeout)
    else:
        update = pricing_service_pb2.UpdatePriceRuleRequest(price_rule=rule, idempotency_key=key)
        await stub.UpdatePriceRule(update, metadata=client.metadata, timeout=client.timeout)


def add_to(commands: Any, add_client: Any) -> None:
    command = commands.add_parser("import-prices", help="make or change price rules from a CSV or JSON file")
    command.add_argument("file")
    command.add_argument("--dry-run", action="store_true", help="only show what would change")
    command.add_argument("--currency", default="CNY")
    command.add_argument("--credits-per-unit", type=int, default=100, help="credits for one unit of the currency")
    command.set_defaults(client=import_prices)
    add_client(command)
